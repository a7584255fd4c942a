//! What brings an edited file back bit for bit.
//!
//! Of most edits the inverse is known up to rounding (an ablation subtracted a product of known factors), so the factors
//! are kept, and what the inverse gets wrong: the exclusive or of its result with the old bytes, which is zero nearly
//! everywhere. It is kept by tile: a bit for every element that is wrong, then the exclusive ors of those, low and high
//! bytes apart; of all elements, without the bits, where many are wrong. Then it is compressed (zstd: a byte carries about a
//! bit of information, which needs an entropy coder).

use super::files::Named;
use super::header::{Header, parse_header};
use super::stages::{Editable, Grid, Held, Inverse, Part, RowInverse};
use crate::linalg::Orthonormal;
use crate::refuse::directions::Factors;
use crate::simd::{Kernel, dispatch, top_bits};
use crate::{Error, Result};
use bytemuck::Pod;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

const MAGIC: &[u8; 8] = b"ABJUNDO2";
const TRAILER: usize = 8 + 32 + 8;
const LEVEL: i32 = 1;
/// Where more than one in so many elements is wrong, their places are not kept.
const SPARSE: usize = 8;

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
            Inverse::Scale(factor, part) => {
                let part = part.map(|p| [p.cycle, p.from, p.to]);
                Ok(json!({"kind": "scale", "factor": factor.to_bits(), "part": part}))
            }
            Inverse::Unknown => Ok(json!({"kind": "unknown"})),
        };
        inverses.iter().map(one).collect()
    }

    pub fn packer(&self) -> Result<Packer> {
        let zstd = zstd::bulk::Compressor::new(LEVEL).map_err(|e| self.failed(&e))?;
        Ok(Packer {
            zstd,
            places: Vec::new(),
            plain: Vec::new(),
            packed: Vec::new(),
        })
    }

    fn failed(&self, err: &std::io::Error) -> Error {
        Error::checkpoint(&self.file.path, format!("compression failed ({err})"))
    }

    /// Keeps what a guess got wrong: where, how many bytes and how many elements of how many; null where it was right.
    pub fn tile(
        &self,
        packer: &mut Packer,
        guess: &[u8],
        right: &[u8],
        element: usize,
    ) -> Result<Value> {
        let Packer {
            zstd,
            places,
            plain,
            packed,
        } = packer;
        places.clear();
        plain.clear();
        dispatch(Compare {
            guess,
            right,
            element,
            places,
            bits: plain,
        });
        let count = right.len() / element;
        if places.is_empty() {
            return Ok(Value::Null);
        }
        if places.len() > count / SPARSE {
            plain.clear();
            places.clear();
            places.extend(0..count as u32);
        }
        for k in 0..element {
            plain.extend(places.iter().map(|at| {
                let at = *at as usize * element + k;
                guess[at] ^ right[at]
            }));
        }
        packed.resize(zstd::zstd_safe::compress_bound(plain.len()), 0);
        let len = zstd
            .compress_to_buffer(plain, packed)
            .map_err(|e| self.failed(&e))?;
        let (at, len) = self.append(&packed[..len])?;
        Ok(json!([at, len, places.len()]))
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

/// What one thread compresses with.
pub struct Packer {
    zstd: zstd::bulk::Compressor<'static>,
    places: Vec<u32>,
    plain: Vec<u8>,
    packed: Vec<u8>,
}

/// Which elements differ: their places, and a bit for every element.
struct Compare<'a> {
    guess: &'a [u8],
    right: &'a [u8],
    element: usize,
    places: &'a mut Vec<u32>,
    bits: &'a mut Vec<u8>,
}

impl Kernel for Compare<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        match self.element {
            2 => self.of(u16::from_le_bytes),
            4 => self.of(u32::from_le_bytes),
            8 => self.of(u64::from_le_bytes),
            _ => self.of(u8::from_le_bytes),
        }
    }
}

impl Compare<'_> {
    #[inline(always)]
    fn of<const N: usize, I: Eq>(self, number: impl Fn([u8; N]) -> I) {
        let (guess, right) = (self.guess.as_chunks::<N>().0, self.right.as_chunks::<N>().0);
        for (block, (guess, right)) in guess.chunks(64).zip(right.chunks(64)).enumerate() {
            let mut differ = [0; 64];
            for ((d, g), r) in differ.iter_mut().zip(guess).zip(right) {
                *d = u8::from(number(*g) != number(*r)) << 7;
            }
            let mut left = top_bits(&differ);
            let bytes = left.to_le_bytes();
            self.bits
                .extend_from_slice(&bytes[..right.len().div_ceil(8)]);
            while left != 0 {
                self.places.push(block as u32 * 64 + left.trailing_zeros());
                left &= left - 1;
            }
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
                Some("scale") => {
                    let part: Option<[usize; 3]> = serde_json::from_value(v["part"].clone())
                        .map_err(|_| self.bad("a part of another form"))?;
                    let part = part.map(|[cycle, from, to]| Part { cycle, from, to });
                    if part.is_some_and(|p| p.from >= p.to || p.to > p.cycle) {
                        return Err(self.bad("a part of nothing"));
                    }
                    Inverse::Scale(float(&v["factor"])?, part)
                }
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
        let parsed: Option<(u64, usize, usize)> = serde_json::from_value(value.clone()).ok();
        let (at, len, wrong) = parsed.ok_or_else(|| self.bad("no place"))?;
        let count = tile.len() / element;
        if wrong > count {
            return Err(self.bad("a tile of another size"));
        }
        let packed = self.bytes((at, len))?;
        let bits = if wrong == count { 0 } else { count.div_ceil(8) };
        let size = bits + wrong * element;
        let plain =
            zstd::bulk::decompress(&packed, size).map_err(|_| self.bad("a damaged tile"))?;
        if plain.len() != size {
            return Err(self.bad("a tile of another size"));
        }
        let (bits, planes) = plain.split_at(bits);
        let differs = |i: &usize| bits.is_empty() || bits[i / 8] >> (i % 8) & 1 == 1;
        let places: Vec<usize> = (0..count).filter(differs).collect();
        if places.len() != wrong {
            return Err(self.bad("a damaged tile"));
        }
        for (k, plane) in planes.chunks_exact(wrong.max(1)).enumerate() {
            for (at, byte) in places.iter().zip(plane) {
                tile[at * element + k] ^= byte;
            }
        }
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

    /// Tiles of every element size and length, right, wrong here and there, and wrong everywhere.
    #[test]
    fn tiles_come_back() {
        let dir = std::env::temp_dir().join(format!("abjure-patch-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let raw = super::super::header::tests::file_of("{}", 0);
        let old = parse_header(Path::new("x"), &raw, raw.len() as u64).unwrap();
        let mut random = crate::random::Random::new(3);
        for element in [1, 2, 4, 8] {
            let path = dir.join(format!("{element}"));
            let writer = PatchWriter::create(&path, &old).unwrap();
            let mut packer = writer.packer().unwrap();
            let mut kept = Vec::new();
            for count in [1, 7, 63, 64, 65, 1000] {
                for rate in [0, 1, 30, 256] {
                    let len = count * element;
                    let right: Vec<u8> = (0..len).map(|_| random.bits() as u8).collect();
                    let mut guess = right.clone();
                    for byte in &mut guess {
                        if random.below(256) < rate {
                            *byte ^= 1 + random.below(255) as u8;
                        }
                    }
                    let entry = writer.tile(&mut packer, &guess, &right, element).unwrap();
                    assert_eq!(entry.is_null(), guess == right);
                    kept.push((entry, guess, right));
                }
            }
            writer.finish(&old).unwrap();
            let reader = PatchReader::open(&path).unwrap();
            for (entry, mut guess, right) in kept {
                reader.correct(&entry, element, &mut guess).unwrap();
                assert!(guess == right);
                if !entry.is_null() {
                    let mut short = vec![0; right.len() + 64 * element];
                    assert!(reader.correct(&entry, element, &mut short).is_err());
                }
            }
            for bad in [
                json!([0, 1]),
                json!([1u64 << 40, 8, 1]),
                json!([0, 8, 1]),
                json!(7),
            ] {
                assert!(reader.correct(&bad, element, &mut [0; 64]).is_err());
            }
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
