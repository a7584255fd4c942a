//! Checkpoints in the safetensors format, larger than memory: checked strictly, edited tile by tile, restored bit for bit.
//!
//! A tile is read at its place in the file into a buffer, edited by the kernels of the wings, hashed and written. Files
//! are not mapped: a map of a file that somebody truncates kills the process, a read returns an error; and from the
//! page cache a read costs one copy of bytes that the hash has to fetch anyway. Nothing here needs `unsafe`.

mod files;
mod hash;
mod header;
mod index;
mod journal;
mod patch;
mod stages;
mod stream;
mod writer;

pub use files::{Named, sha256_of};
pub use header::{Header, MAX_HEADER, TensorInfo, parse_header, read_header};
pub use index::{Checkpoint, Shard, open, parse_index};
pub use journal::{rollback, save};
pub use patch::PatchReader;
pub use stages::{Importance, Part, Spec};
pub use stream::{Options, ShardJob, run};

const _: () = assert!(
    cfg!(target_endian = "little"),
    "safetensors files are little-endian, and tiles are used as they are read"
);
