//! Texts as rows of weighted n-grams, and classifiers on them.

pub mod doc2vec;
pub mod intern;
pub mod logistic;
pub mod ngrams;
pub mod similar;
pub mod tokens;
pub mod tsetlin;
pub mod vocabulary;
