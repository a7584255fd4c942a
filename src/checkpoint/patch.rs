//! What brings an edited file back bit for bit.
//!
//! Of most edits the inverse is known up to rounding (an ablation subtracted a product of known factors), so the factors
//! are kept, and what the inverse gets wrong: the exclusive or of its result with the old bytes, which is zero nearly
//! everywhere. It is kept by tile, low and high bytes of the elements apart, compressed (zstd: almost all of it is runs of
//! zeros, and where it is not, one bit in eight carries information, which needs an entropy coder).

use super::files::Named;
use super::header::{Header, parse_header};
use super::stages::{Editable, Grid, Held, Inverse, RowInverse};
use crate::linalg::Orthonormal;
use crate::refuse::directions::Factors;
use crate::{Error, Result};
use bytemuck::Pod;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

const MAGIC: &[u8; 8] = b"ABJUNDO1";
const TRAILER: usize = 8 + 32 + 8;
const LEVEL: i32 = 1;

#[derive(Default)]
struct State {
    at: u64,
    /// Places of bases that are written already, by address.
    bases: HashMap<usize, Value>,
    tensors: BTreeMap<usize, Value>,
}

/// A patch that is being written, by several threads.
pub struct PatchWriter {
    pub file: Named,
    state: Mutex<State>,
}

impl PatchWriter {
    /// Starts a patch that knows the header of the old file.
    pub fn create(path: &Path, old: &Header) -> Result<Self> {
        let writer = Self {
            file: Named::create(path)?,
            state: Mutex::new(State::default()),
        };
        writer.append(MAGIC)?;
        writer.append(&old.raw)?;
        Ok(writer)
    }

    fn append(&self, bytes: &[u8]) -> Result<(u64, usize)> {
        let at = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let at = state.at;
            state.at += bytes.len() as u64;
            at
        };
        self.file.write_at(at, bytes)?;
        Ok((at, bytes.len()))
    }

    fn numbers<A: Pod>(&self, values: &[A]) -> Result<Value> {
        let (at, len) = self.append(bytemuck::cast_slice(values))?;
        Ok(json!([at, len]))
    }

    fn basis(&self, q: &Arc<Orthonormal>) -> Result<Value> {
        let key = Arc::as_ptr(q) as usize;
        let lock = || self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = lock().bases.get(&key) {
            return Ok(known.clone());
        }
        let found = json!({"rank": q.rank, "width": q.width, "rows": self.numbers(&q.rows)?});
        lock().bases.insert(key, found.clone());
        Ok(found)
    }

    /// Keeps the inverses of a matrix.
    pub fn inverses<A: crate::refuse::directions::edit::Arithmetic + Pod>(
        &self,
        inverses: &[Inverse<'_, A>],
    ) -> Result<Value> {
        let one = |inverse: &Inverse<'_, A>| match inverse {
            Inverse::Columns(f) => Ok(
                json!({"kind": "columns", "q": self.basis(&f.q)?, "scale": f.scale.to_bits(),
                "products": self.numbers(&f.products)?, "norms": self.numbers(&f.norms)?,
                "factor": self.numbers(&f.column_factor)?}),
            ),
            Inverse::Rows(r) => Ok(
                json!({"kind": "rows", "q": self.basis(&r.q)?, "scale": r.scale.to_bits(),
                "coefficients": self.numbers(&r.coefficients)?, "stretched": self.numbers(&r.stretched)?}),
            ),
            Inverse::Scale(factor) => Ok(json!({"kind": "scale", "factor": factor.to_bits()})),
            Inverse::Unknown => Ok(json!({"kind": "unknown"})),
        };
        inverses.iter().map(one).collect()
    }

    /// Keeps what a guess got wrong; `None` where it was right.
    pub fn tile(&self, wrong: &[u8], element: usize) -> Result<Option<(u64, usize)>> {
        if wrong.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        let planes = split(wrong, element);
        let packed = zstd::bulk::compress(&planes, LEVEL)
            .map_err(|e| Error::checkpoint(&self.file.path, format!("compression failed ({e})")))?;
        self.append(&packed).map(Some)
    }

    /// Keeps the directory entry of tensor `index`.
    pub fn tensor(&self, index: usize, entry: Value) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.tensors.insert(index, entry);
    }

    /// Ends the patch; it is on the storage device then.
    pub fn finish(&self, old: &Header) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let tensors: Vec<_> = std::mem::take(&mut state.tensors).into_values().collect();
        drop(state);
        let footer = json!({"header": [MAGIC.len(), old.raw.len()], "len": old.file_len(), "tensors": tensors}).to_string();
        let mut end = footer.as_bytes().to_vec();
        end.extend((footer.len() as u64).to_le_bytes());
        end.extend(Sha256::digest(footer.as_bytes()));
        end.extend(MAGIC);
        self.append(&end)?;
        self.file.sync()
    }
}

/// The n-th bytes of all elements together.
fn split(bytes: &[u8], element: usize) -> Vec<u8> {
    let n = bytes.len() / element;
    let mut out = vec![0; bytes.len()];
    for (k, plane) in out.chunks_exact_mut(n.max(1)).enumerate() {
        for (to, from) in plane.iter_mut().zip(bytes[k..].iter().step_by(element)) {
            *to = *from;
        }
    }
    out
}

fn join(planes: &[u8], element: usize, out: &mut [u8]) {
    let n = planes.len() / element;
    for (k, plane) in planes.chunks_exact(n.max(1)).enumerate() {
        for (to, from) in out[k..].iter_mut().step_by(element).zip(plane) {
            *to = *from;
        }
    }
}

/// A finished patch.
#[derive(Debug)]
pub struct PatchReader {
    file: Named,
    len: u64,
    header: (u64, usize),
    old_len: u64,
    tensors: HashMap<String, Value>,
}

impl PatchReader {
    /// Opens a patch and checks that it is whole.
    ///
    /// # Errors
    /// `Checkpoint` if it is no patch, or a damaged one.
    pub fn open(path: &Path) -> Result<Self> {
        let file = Named::open(path)?;
        let bad = |what: &str| Error::checkpoint(path, format!("is no whole patch: {what}"));
        let len = file.size()?;
        let Some(end) = len.checked_sub(TRAILER as u64).filter(|e| *e >= 8) else {
            return Err(bad("too short"));
        };
        let (mut start, mut trailer) = ([0; 8], [0; TRAILER]);
        file.read_at(0, &mut start)?;
        file.read_at(end, &mut trailer)?;
        if start != *MAGIC || !trailer.ends_with(MAGIC) {
            return Err(bad("it does not begin and end as one"));
        }
        let length = u64::from_le_bytes(std::array::from_fn(|i| trailer[i]));
        let Some(at) = end.checked_sub(length).filter(|a| *a >= 8) else {
            return Err(bad("its directory is longer than the file"));
        };
        let mut footer = vec![0; length as usize];
        file.read_at(at, &mut footer)?;
        if Sha256::digest(&footer)[..] != trailer[8..40] {
            return Err(bad("its directory is damaged"));
        }
        let footer: Value =
            serde_json::from_slice(&footer).map_err(|_| bad("its directory is damaged"))?;
        let header = place(&footer["header"]).ok_or_else(|| bad("no header"))?;
        let old_len = footer["len"].as_u64().ok_or_else(|| bad("no length"))?;
        let list = footer["tensors"].as_array().cloned().unwrap_or_default();
        let named = |t: Value| Some((t["name"].as_str()?.to_owned(), t));
        let tensors = (list.into_iter().map(named).collect::<Option<_>>())
            .ok_or_else(|| bad("a tensor without a name"))?;
        Ok(Self {
            file,
            len,
            header,
            old_len,
            tensors,
        })
    }

    fn bad(&self, what: &str) -> Error {
        Error::checkpoint(&self.file.path, format!("is no whole patch: {what}"))
    }

    fn bytes(&self, (at, len): (u64, usize)) -> Result<Vec<u8>> {
        if at.checked_add(len as u64).is_none_or(|e| e > self.len) {
            return Err(self.bad("a place outside of the file"));
        }
        let mut out = vec![0; len];
        self.file.read_at(at, &mut out)?;
        Ok(out)
    }

    /// The old file's header.
    pub fn old_header(&self) -> Result<Header> {
        parse_header(&self.file.path, &self.bytes(self.header)?, self.old_len)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn tensor(&self, name: &str) -> Option<&Value> {
        self.tensors.get(name)
    }

    fn numbers<A: Pod>(&self, value: &Value) -> Result<Vec<A>> {
        let found = place(value).ok_or_else(|| self.bad("no place"))?;
        if !found.1.is_multiple_of(size_of::<A>()) {
            return Err(self.bad("a number is cut"));
        }
        let mut out = vec![A::zeroed(); found.1 / size_of::<A>()];
        bytemuck::cast_slice_mut(&mut out).copy_from_slice(&self.bytes(found)?);
        Ok(out)
    }

    fn basis(&self, value: &Value) -> Result<Arc<Orthonormal>> {
        let number = |k: &str| value[k].as_u64().map(|v| v as usize);
        let (rank, width) =
            (number("rank").zip(number("width"))).ok_or_else(|| self.bad("no basis"))?;
        let rows: Vec<f64> = self.numbers(&value["rows"])?;
        if rank.checked_mul(width) != Some(rows.len()) {
            return Err(self.bad("a basis of another size"));
        }
        Ok(Arc::new(Orthonormal { width, rank, rows }))
    }

    /// The inverses of one matrix of a tensor cut as `grid`.
    pub fn inverses<T: Editable>(
        &self,
        entry: &Value,
        grid: Grid,
    ) -> Result<Vec<Inverse<'static, T::Acc>>> {
        let float = |v: &Value| {
            v.as_u64()
                .map(f64::from_bits)
                .ok_or_else(|| self.bad("no number"))
        };
        let one = |v: &Value| {
            Ok(match v["kind"].as_str() {
                Some("columns") => {
                    let f = Factors::<T::Acc> {
                        q: self.basis(&v["q"])?,
                        scale: float(&v["scale"])?,
                        products: self.numbers(&v["products"])?,
                        norms: self.numbers(&v["norms"])?,
                        column_factor: self.numbers(&v["factor"])?,
                    };
                    let fits = f.products.len() == f.q.rank * grid.width
                        && f.q.width == grid.rows
                        && [0, grid.width].contains(&f.column_factor.len())
                        && [0, grid.rows].contains(&f.norms.len());
                    if !fits {
                        return Err(self.bad("factors of another size"));
                    }
                    Inverse::Columns(Arc::new(f))
                }
                Some("rows") => {
                    let r = RowInverse::<T::Acc> {
                        q: self.basis(&v["q"])?,
                        scale: float(&v["scale"])?,
                        coefficients: self.numbers(&v["coefficients"])?,
                        stretched: self.numbers(&v["stretched"])?,
                    };
                    let fits = r.q.width == grid.width
                        && r.coefficients.len() == grid.rows * r.q.rank
                        && [0, grid.rows].contains(&r.stretched.len());
                    if !fits {
                        return Err(self.bad("coefficients of another size"));
                    }
                    Inverse::Rows(Held::Owned(r))
                }
                Some("scale") => Inverse::Scale(float(&v["factor"])?),
                Some("unknown") => Inverse::Unknown,
                _ => return Err(self.bad("an unknown kind of edit")),
            })
        };
        let list = entry.as_array().ok_or_else(|| self.bad("no edits"))?;
        list.iter().map(one).collect()
    }

    /// Puts right what the guess in `tile` got wrong.
    pub fn correct(&self, value: &Value, element: usize, tile: &mut [u8]) -> Result<()> {
        if value.is_null() {
            return Ok(());
        }
        let found = place(value).ok_or_else(|| self.bad("no place"))?;
        let packed = self.bytes(found)?;
        let planes =
            zstd::bulk::decompress(&packed, tile.len()).map_err(|_| self.bad("a damaged tile"))?;
        if planes.len() != tile.len() {
            return Err(self.bad("a tile of another size"));
        }
        let mut wrong = vec![0; tile.len()];
        join(&planes, element, &mut wrong);
        tile.iter_mut().zip(&wrong).for_each(|(t, w)| *t ^= w);
        Ok(())
    }
}

fn place(value: &Value) -> Option<(u64, usize)> {
    let [at, len] = value.as_array()?.as_slice() else {
        return None;
    };
    Some((at.as_u64()?, len.as_u64()? as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes() {
        let bytes: Vec<u8> = (0..12).collect();
        for element in [1, 2, 4] {
            let planes = split(&bytes, element);
            let mut back = vec![0; 12];
            join(&planes, element, &mut back);
            assert_eq!(back, bytes);
        }
        assert_eq!(split(&bytes, 4)[..3], [0, 4, 8]);
    }
}
