//! The extension module `abjure._native`: argument intake, the detached call, and nothing else.

use pyo3::prelude::*;

mod array;
mod calibrate;
mod checkpoint;
mod decoding;
mod directions;
mod errors;
mod experts;
mod forget;
mod logprobs;
mod long;
mod matching;
mod measure;
mod noise;
mod permitted;
mod protect;
mod recourse;
mod system;
mod text;
mod topics;
mod tree;
mod tsetlin;

#[pymodule(gil_used = false)]
fn _native(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    system::register(m)?;
    forget::register(m)?;
    logprobs::register(m)?;
    directions::register(m)?;
    experts::register(m)?;
    decoding::register(m)?;
    calibrate::register(m)?;
    noise::register(m)?;
    protect::register(m)?;
    recourse::register(m)?;
    tree::register(m)?;
    matching::register(m)?;
    text::register(m)?;
    topics::register(m)?;
    tsetlin::register(m)?;
    checkpoint::register(m)?;
    permitted::register(m)?;
    measure::register(m)
}
