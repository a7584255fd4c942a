//! A set of n-grams as a tree of tokens, and the n-grams of texts counted against it.

use super::intern::{Keys, Strings};
use super::ngrams::{Counts, chunks};
use super::tokens::{Stream, Tokenizer, UNKNOWN};
use crate::{Error, Result, par};

const NONE: u32 = u32::MAX;

/// N-grams, each with the number of its column.
#[derive(Debug, Clone)]
pub struct Vocabulary {
    tokenizer: Tokenizer,
    tokens: Strings,
    /// Node after the root by token.
    first: Keys,
    /// Node after a node and a token; numbered after those of `first`.
    further: Keys,
    column: Vec<u32>,
    columns: usize,
}

impl Vocabulary {
    /// Of distinct terms, in the order of their columns.
    ///
    /// # Errors
    /// `Value`: a term stands twice; `Degenerate`: no terms.
    pub fn new<'a>(
        terms: impl ExactSizeIterator<Item = &'a str>,
        tokenizer: Tokenizer,
    ) -> Result<Self> {
        let columns = terms.len();
        if columns == 0 {
            return Err(Error::degenerate(
                "vocabulary",
                "expected at least one n-gram",
            ));
        }
        let mut tokens = Strings::default();
        let parsed: Vec<Vec<u32>> = terms
            .map(|t| tokenizer.parse(t, &mut |w| tokens.intern(w)))
            .collect();
        let (mut first, mut further) = (Keys::default(), Keys::default());
        for term in &parsed {
            term.first().map(|t| first.intern(u64::from(*t)));
        }
        let base = first.keys().len() as u32;
        let mut column = vec![NONE; base as usize];
        for (number, term) in parsed.iter().enumerate() {
            let Some((head, tail)) = term.split_first() else {
                return Err(Error::value(
                    "vocabulary",
                    "n-grams of one token or more",
                    "''",
                ));
            };
            let mut node = first.intern(u64::from(*head));
            for token in tail {
                node = base + further.intern(u64::from(node) << 32 | u64::from(*token));
            }
            column.resize(base as usize + further.keys().len(), NONE);
            if std::mem::replace(&mut column[node as usize], number as u32) != NONE {
                let found = format!("one twice (column {number})");
                return Err(Error::value("vocabulary", "distinct n-grams", found));
            }
        }
        Ok(Self {
            tokenizer,
            tokens,
            first,
            further,
            column,
            columns,
        })
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Counts of the vocabulary's n-grams in texts, columns ascending in each row; with `binary` 1 for each found.
    pub fn count(&self, texts: &[&str], binary: bool) -> Counts {
        let bytes = texts.iter().map(|t| t.len()).sum();
        let parts = par::map(bytes, chunks(texts), |range| {
            let mut out = Counts::empty();
            let (mut stream, mut found) = (Stream::default(), Vec::new());
            for text in &texts[range] {
                stream.tokens.clear();
                stream.segments.clear();
                stream.texts.clear();
                found.clear();
                let mut number = |w: &[u8]| self.tokens.find(w).unwrap_or(UNKNOWN);
                self.tokenizer.append(text, &mut stream, &mut number);
                stream.for_each_segment(|_, start, end| {
                    self.walk(&stream.tokens[start..end], &mut found);
                });
                out.push_row(&mut found, binary);
            }
            out
        });
        Counts::concat(parts)
    }

    fn walk(&self, tokens: &[u32], found: &mut Vec<u32>) {
        let base = self.first.keys().len() as u32;
        for start in 0..tokens.len() {
            let mut node = NONE;
            for (n, token) in tokens[start..]
                .iter()
                .take(self.tokenizer.longest)
                .enumerate()
            {
                let next = match n {
                    _ if *token == UNKNOWN => None,
                    0 => self.first.find(u64::from(*token)),
                    _ => (self.further)
                        .find(u64::from(node) << 32 | u64::from(*token))
                        .map(|v| base + v),
                };
                let Some(next) = next else { break };
                node = next;
                let column = self.column[node as usize];
                if column != NONE && self.tokenizer.counts(n + 1, tokens.len()) {
                    found.push(column);
                }
            }
        }
    }
}
