//! Protecting data: Bayes error of kernel density posteriors, and its gradient.
