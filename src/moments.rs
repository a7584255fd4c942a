//! Streaming moments.
