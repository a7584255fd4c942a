//! Token-wise logit bias, gates and phrase automata while decoding.
//!
//! One batch of logits is a matrix of rows, one per sequence, over the vocabulary. Everything here first decides what
//! it would write, over all rows, and writes only when no row is at fault. What a kernel does not need to know it
//! does not read: a bias or a forbidden phrase touches its own entries and nothing else of the row.

mod automaton;
mod bytes;
mod decimal;
mod edits;
mod gate;
mod matching;
mod reduce;
mod tilt;
mod trie;

pub use automaton::Automaton;
pub use bytes::{ByteAutomaton, Reading, Vocabulary};
pub use decimal::Margin;
pub use edits::{Edits, bias, force};
pub use gate::{Gate, GateOptions, NO_FIRE, NOT_ASKED, NOT_SELECTED, NoFire, Position, Rule};
pub use matching::{Contexts, Matcher, Penalty, apply, edits};
pub use reduce::{Groups, margins, max_gaps, row_lse};
pub use tilt::{Tilted, tilted};

use crate::element::{Element, Real};
use crate::{Error, Result};

/// Name of the array that every function here reads or writes, for messages.
pub const LOGITS: &str = "logits";

/// Entries that no processor can work with: NaN, or a token made certain by +∞.
#[inline(always)]
fn is_poison<T: Element>(v: T) -> bool {
    let v = v.load();
    v.is_nan() || v == T::Acc::INFINITY
}

/// The error for entry `token` of row `row`.
fn poison_error<T: Element>(row: usize, width: usize, token: usize, v: T) -> Error {
    Error::NonFinite {
        arg: LOGITS,
        index: row * width + token,
        found: v.load().to_f64(),
    }
}

/// Checks a token id against the vocabulary.
fn token(arg: &'static str, id: i64, width: usize) -> Result<u32> {
    match u32::try_from(id) {
        Ok(id) if (id as usize) < width => Ok(id),
        _ => Err(Error::value(
            arg,
            format!("token ids from 0 to {}", width.saturating_sub(1)),
            id,
        )),
    }
}

fn no_token_left(row: usize) -> Error {
    Error::degenerate(
        LOGITS,
        format!("row {row} has no token left that could be generated"),
    )
}
