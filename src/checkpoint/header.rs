//! The header of a safetensors file: eight bytes of length, then JSON; checked before anything is believed.
//!
//! Stricter than the format's own library in one respect (a name that stands twice is an error, not the last one wins),
//! and equal to it in the others: no holes, no overlaps, sizes that follow from shape and dtype, nothing after the data.

use super::files::{Named, hex};
use crate::element::DType;
use crate::{Error, Result};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::marker::PhantomData;
use std::path::Path;

/// Longest header that is read, as in the format's own library.
pub const MAX_HEADER: u64 = 100_000_000;

/// Names of the format, and bits of an element.
const DTYPES: [(&str, u64); 21] = [
    ("BOOL", 8),
    ("F4", 4),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
    ("U8", 8),
    ("I8", 8),
    ("F8_E5M2", 8),
    ("F8_E4M3", 8),
    ("F8_E8M0", 8),
    ("F8_E4M3FNUZ", 8),
    ("F8_E5M2FNUZ", 8),
    ("I16", 16),
    ("U16", 16),
    ("F16", 16),
    ("BF16", 16),
    ("I32", 32),
    ("U32", 32),
    ("F32", 32),
    ("F64", 64),
    ("I64", 64),
    ("U64", 64),
];

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    /// As the format spells it.
    pub dtype: &'static str,
    pub shape: Vec<u64>,
    /// First byte, counted from the start of the file.
    pub begin: u64,
    /// One past the last byte.
    pub end: u64,
}

impl TensorInfo {
    /// The element type, if it is one that edits can touch.
    pub fn editable(&self) -> Option<DType> {
        match self.dtype {
            "F64" => Some(DType::F64),
            "F32" => Some(DType::F32),
            "F16" => Some(DType::F16),
            "BF16" => Some(DType::BF16),
            _ => None,
        }
    }

    pub fn bytes(&self) -> u64 {
        self.end - self.begin
    }
}

/// A checked header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Length and JSON, byte for byte as in the file.
    pub raw: Vec<u8>,
    /// In the order of their data.
    pub tensors: Vec<TensorInfo>,
    pub metadata: Vec<(String, String)>,
}

impl Header {
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|t| t.name == name)
    }

    /// Length of the file that it describes.
    pub fn file_len(&self) -> u64 {
        self.tensors.last().map_or(self.raw.len() as u64, |t| t.end)
    }

    /// The header of a file that also holds copies: (name of the copy, name of a tensor here). They come last; what is
    /// here keeps its text and its order.
    ///
    /// # Errors
    /// `Value` if a name is not here, or a new one is.
    pub fn with_copies(&self, path: &Path, copies: &[(String, String)]) -> Result<Self> {
        let text = String::from_utf8_lossy(&self.raw[8..]);
        let open = text.trim_end().strip_suffix('}').unwrap_or_default();
        let (mut json, mut at) = (
            open.trim_end().to_owned(),
            self.file_len() - self.raw.len() as u64,
        );
        for (new, old) in copies {
            let Some(t) = self.tensor(old).filter(|_| self.tensor(new).is_none()) else {
                let expected = "a tensor to copy and a name that is free";
                return Err(Error::value(
                    "keep",
                    expected,
                    format!("{old:?} as {new:?}"),
                ));
            };
            let entry =
                json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": [at, at + t.bytes()]});
            let comma = if json.ends_with('{') { "" } else { "," };
            json += &format!("{comma}{}:{entry}", Value::from(new.as_str()));
            at += t.bytes();
        }
        json.push('}');
        while !json.len().is_multiple_of(8) {
            json.push(' ');
        }
        let mut raw = (json.len() as u64).to_le_bytes().to_vec();
        raw.extend(json.as_bytes());
        let len = raw.len() as u64 + at;
        parse_header(path, &raw, len)
    }

    pub fn sha256(&self) -> String {
        hex(&Sha256::digest(&self.raw))
    }
}

/// A JSON object whose keys are kept in order and differ from each other.
pub struct Object<V>(pub Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Object<V> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        struct Entries<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Entries<V> {
            type Value = Object<V>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a JSON object")
            }
            fn visit_map<M: MapAccess<'de>>(
                self,
                mut map: M,
            ) -> std::result::Result<Self::Value, M::Error> {
                let (mut seen, mut out) = (HashSet::new(), Vec::new());
                while let Some((key, value)) = map.next_entry::<String, V>()? {
                    if !seen.insert(key.clone()) {
                        return Err(serde::de::Error::custom(format!("{key:?} stands twice")));
                    }
                    out.push((key, value));
                }
                Ok(Object(out))
            }
        }
        d.deserialize_map(Entries(PhantomData))
    }
}

/// Checks the header of a file of `file_len` bytes that begins with `start`, of which the header must be part.
///
/// # Errors
/// `Checkpoint` with `path` and what is wrong.
pub fn parse_header(path: &Path, start: &[u8], file_len: u64) -> Result<Header> {
    let bad = |reason: String| Error::checkpoint(path, reason);
    let json_len = header_len(path, start, file_len)?;
    let data = 8 + json_len;
    let raw = start
        .get(..data as usize)
        .ok_or_else(|| bad("truncated inside its header".into()))?;
    let text =
        std::str::from_utf8(&raw[8..]).map_err(|_| bad("its header is not UTF-8 text".into()))?;
    if !text.starts_with('{') {
        return Err(bad("its header does not begin with '{'".into()));
    }
    let entries: Object<Object<Value>> = serde_json::from_str(text)
        .map_err(|e| bad(format!("its header is not what the format asks for: {e}")))?;
    let (mut tensors, mut metadata) = (Vec::new(), Vec::new());
    for (name, entry) in entries.0 {
        if name == "__metadata__" {
            for (key, value) in entry.0 {
                let Value::String(value) = value else {
                    return Err(bad(format!("metadata {key:?}: expected text, got {value}")));
                };
                metadata.push((key, value));
            }
            continue;
        }
        let tensor = tensor(name.clone(), &entry, data)
            .map_err(|reason| bad(format!("tensor {name:?}: {reason}")))?;
        tensors.push(tensor);
    }
    tensors.sort_by_key(|t| (t.begin, t.end));
    let mut at = data;
    for t in &tensors {
        if t.begin != at {
            let kind = if t.begin < at {
                "overlaps the tensor before it"
            } else {
                "leaves a hole before it"
            };
            let offsets = format!("[{}, {}]", t.begin - data, t.end - data);
            return Err(bad(format!("tensor {:?}: {offsets} {kind}", t.name)));
        }
        at = t.end;
    }
    if at != file_len {
        let kind = if at > file_len {
            "truncated"
        } else {
            "too long"
        };
        return Err(bad(format!(
            "{kind}: its header describes {at} bytes, the file has {file_len}"
        )));
    }
    Ok(Header {
        raw: raw.to_vec(),
        tensors,
        metadata,
    })
}

/// Length of the JSON, checked against the file.
fn header_len(path: &Path, start: &[u8], file_len: u64) -> Result<u64> {
    let bad = |reason: String| Error::checkpoint(path, reason);
    if let Some(kind) = foreign(start) {
        return Err(bad(kind.into()));
    }
    let Some(length) = start.get(..8) else {
        let found = format!("{file_len} bytes are too few for a safetensors file");
        return Err(bad(format!("truncated: {found}")));
    };
    let length = u64::from_le_bytes(std::array::from_fn(|i| length[i]));
    if length > MAX_HEADER {
        let limit = format!("more than the {MAX_HEADER} that the format allows");
        return Err(bad(format!(
            "it states a header of {length} bytes, {limit}"
        )));
    }
    if length < 2 || length > file_len.saturating_sub(8) {
        return Err(bad(format!(
            "it states a header of {length} bytes in a file of {file_len}"
        )));
    }
    Ok(length)
}

/// What a file that is no safetensors file looks like.
fn foreign(start: &[u8]) -> Option<&'static str> {
    if start.starts_with(b"PK\x03\x04") || start.starts_with(b"\x80\x02") {
        return Some(
            "looks like a pickle, which can run code when it is loaded; it is refused and was not loaded. \
             Convert it to safetensors with the tool that made it",
        );
    }
    if start.starts_with(b"GGUF") {
        return Some("is a GGUF file, not safetensors");
    }
    (start.starts_with(b"version https://git-lfs"))
        .then_some("is a Git LFS pointer; the file itself was not downloaded")
}

fn tensor(
    name: String,
    entry: &Object<Value>,
    data: u64,
) -> std::result::Result<TensorInfo, String> {
    let field = |key: &str| {
        let found = entry.0.iter().find(|(k, _)| k == key);
        found.map(|(_, v)| v).ok_or(format!("no {key:?}"))
    };
    if let Some((key, _)) =
        (entry.0.iter()).find(|(k, _)| !["dtype", "shape", "data_offsets"].contains(&&k[..]))
    {
        return Err(format!("unknown entry {key:?}"));
    }
    let dtype = field("dtype")?;
    let known = (DTYPES.iter()).find(|(n, _)| dtype.as_str() == Some(n));
    let (dtype, bits) = *known.ok_or(format!("unknown dtype {dtype}"))?;
    let numbers = |key| -> std::result::Result<Vec<u64>, String> {
        let list = field(key)?;
        let numbers = list
            .as_array()
            .and_then(|l| l.iter().map(Value::as_u64).collect::<Option<Vec<u64>>>());
        numbers.ok_or(format!("{key}: expected non-negative integers, got {list}"))
    };
    let shape = numbers("shape")?;
    let offsets = numbers("data_offsets")?;
    let [begin, end] = offsets[..] else {
        return Err(format!("data_offsets: expected two, got {offsets:?}"));
    };
    let count = (shape.iter()).try_fold(1u64, |n, d| n.checked_mul(*d));
    let size = (count.and_then(|n| n.checked_mul(bits)))
        .filter(|b| b.is_multiple_of(8))
        .ok_or(format!("shape {shape:?} of {dtype} has no size in bytes"))?
        / 8;
    if end < begin || end - begin != size {
        return Err(format!(
            "data_offsets [{begin}, {end}] do not hold the {size} bytes of shape {shape:?} in {dtype}"
        ));
    }
    let (begin, end) = begin
        .checked_add(data)
        .zip(end.checked_add(data))
        .ok_or("data_offsets overflow")?;
    Ok(TensorInfo {
        name,
        dtype,
        shape,
        begin,
        end,
    })
}

/// Reads and checks the header of a file.
///
/// # Errors
/// `Checkpoint` if it cannot be read or is no sound safetensors file.
pub fn read_header(path: &Path) -> Result<Header> {
    header_of(&Named::open(path)?)
}

pub(super) fn header_of(file: &Named) -> Result<Header> {
    let len = file.size()?;
    let mut start = vec![0; len.min(32) as usize];
    file.read_at(0, &mut start)?;
    let json = header_len(&file.path, &start, len)?;
    start.resize(8 + json as usize, 0);
    file.read_at(0, &mut start)?;
    parse_header(&file.path, &start, len)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub fn file_of(json: &str, data: usize) -> Vec<u8> {
        let mut out = (json.len() as u64).to_le_bytes().to_vec();
        out.extend(json.as_bytes());
        out.resize(out.len() + data, 7);
        out
    }

    fn parse(bytes: &[u8]) -> Result<Header> {
        parse_header(Path::new("x.safetensors"), bytes, bytes.len() as u64)
    }

    fn reason(bytes: &[u8]) -> String {
        parse(bytes).unwrap_err().to_string()
    }

    const GOOD: &str = r#"{"__metadata__":{"format":"pt"},
        "b":{"dtype":"BF16","shape":[2,3],"data_offsets":[16,28]},
        "e":{"dtype":"F32","shape":[0,9],"data_offsets":[16,16]},
        "a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}} "#;

    #[test]
    fn a_sound_header() {
        let header = parse(&file_of(GOOD, 28)).unwrap();
        let names: Vec<_> = header.tensors.iter().map(|t| &t.name[..]).collect();
        assert_eq!(names, ["a", "e", "b"]);
        assert_eq!(header.metadata, [("format".into(), "pt".into())]);
        assert_eq!(header.tensor("b").unwrap().end, 28 + 8 + GOOD.len() as u64);
        assert_eq!(header.raw, file_of(GOOD, 0));
    }

    #[test]
    fn copies_are_added_at_the_end() {
        let header = parse(&file_of(GOOD, 28)).unwrap();
        let copy = [("c".to_owned(), "b".to_owned())];
        let new = header.with_copies(Path::new("y"), &copy).unwrap();
        let c = new.tensors.last().unwrap();
        assert_eq!(
            (&c.name[..], &c.shape[..], c.bytes(), c.dtype),
            ("c", &[2, 3][..], 12, "BF16")
        );
        assert_eq!(new.file_len(), new.raw.len() as u64 + 40);
        assert_eq!(new.metadata, header.metadata);
        for bad in [("a", "b"), ("c", "z")] {
            let bad = [(bad.0.to_owned(), bad.1.to_owned())];
            assert!(header.with_copies(Path::new("y"), &bad).is_err());
        }
        let empty = parse(&file_of("{}", 0)).unwrap();
        assert!(
            empty
                .with_copies(Path::new("y"), &[])
                .unwrap()
                .tensors
                .is_empty()
        );
    }

    #[test]
    fn what_is_refused_and_how() {
        let one = |entry: &str, data: usize| reason(&file_of(&format!("{{{entry}}}"), data));
        for (found, wanted) in [
            (reason(&file_of(GOOD, 27)), "truncated"),
            (reason(&file_of(GOOD, 29)), "too long"),
            (reason(b"\x05"), "too few"),
            (reason(&[0xff; 40]), "more than"),
            (
                reason(&[9, 1, 0, 0, 0, 0, 0, 0, b'{']),
                "states a header of 265",
            ),
            (reason(&file_of("[]", 0)), "begin with"),
            (reason(b"PK\x03\x04 and so on"), "pickle"),
            (reason(b"\x80\x02}q\x00 and so on"), "pickle"),
            (reason(b"GGUF and so on"), "GGUF"),
            (
                one(
                    r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#,
                    4,
                ),
                "twice",
            ),
            (
                one(
                    r#""a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}"#,
                    4,
                ),
                "twice",
            ),
            (
                one(r#""a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}"#, 4),
                "unknown dtype",
            ),
            (
                one(
                    r#""a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#,
                    4,
                ),
                "non-negative",
            ),
            (
                one(
                    r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}"#,
                    4,
                ),
                "two",
            ),
            (
                one(r#""a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}"#, 4),
                "do not hold",
            ),
            (
                one(r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}"#, 4),
                "do not hold",
            ),
            (
                one(r#""a":{"dtype":"F32","shape":[1]}"#, 4),
                "no \"data_offsets\"",
            ),
            (
                one(
                    r#""a":{"dtype":"F32","shape":[4294967296,4294967296,16],"data_offsets":[0,4]}"#,
                    4,
                ),
                "no size",
            ),
            (
                one(r#""a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}"#, 1),
                "no size",
            ),
            (
                one(
                    r#""a":{"dtype":"F32","shape":[1],"data_offsets":[18446744073709551610,18446744073709551614]}"#,
                    4,
                ),
                "overflow",
            ),
            (
                one(
                    r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#,
                    8,
                ),
                "overlaps",
            ),
            (
                one(r#""a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#, 8),
                "hole",
            ),
            (one(r#""__metadata__":{"n":1}"#, 0), "expected text"),
        ] {
            assert!(found.contains(wanted), "{found} | {wanted}");
            assert!(found.starts_with("x.safetensors: "), "{found}");
        }
        let deep = format!("{{\"a\":{}", "[".repeat(100_000));
        let found = reason(&file_of(&deep, 0));
        assert!(found.starts_with("x.safetensors: "), "{found}");
    }

    /// What the rest of the crate relies on, of any header that is accepted.
    pub fn sound(header: &Header, len: u64) {
        let mut at = header.raw.len() as u64;
        let mut names = HashSet::new();
        for t in &header.tensors {
            assert!(names.insert(&t.name));
            assert!(t.begin == at && t.end >= t.begin);
            at = t.end;
            if let Some(dtype) = t.editable() {
                let count: u64 = t.shape.iter().product();
                assert_eq!(count * dtype.size() as u64, t.bytes());
            }
        }
        assert_eq!(at, len);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]
        /// Bytes at random never panic, take long or yield an unsound header.
        #[test]
        fn noise(bytes in proptest::collection::vec(any::<u8>(), 0..200), len in 0u64..300) {
            let mut framed = len.to_le_bytes().to_vec();
            framed.extend(&bytes);
            for b in [&bytes, &framed] {
                if let Ok(h) = parse(b) {
                    sound(&h, b.len() as u64);
                }
            }
        }

        /// A sound file with bytes changed, cut out, doubled.
        #[test]
        fn mutations(
            edits in proptest::collection::vec((any::<prop::sample::Index>(), 0usize..4, any::<u8>()), 1..5),
        ) {
            let mut bytes = file_of(GOOD, 28);
            for (at, kind, value) in edits {
                if bytes.is_empty() {
                    break;
                }
                let i = at.index(bytes.len());
                match kind {
                    0 => bytes[i] = value,
                    1 => bytes[i] = *b"0123456789,:[]{}\"ae"
                        .get(usize::from(value) % 19)
                        .unwrap(),
                    2 => drop(bytes.remove(i)),
                    _ => bytes.insert(i, bytes[i]),
                }
            }
            if let Ok(h) = parse(&bytes) {
                sound(&h, bytes.len() as u64);
            }
        }

        /// Headers of the right form with numbers at random: accepted exactly where they fit.
        #[test]
        fn offsets(
            tensors in proptest::collection::vec((0u64..4, 0u64..4, 0u64..40, 0u64..40), 1..4), data in 0usize..60,
        ) {
            let entries: Vec<String> = (tensors.iter().enumerate()).map(|(i, (a, b, from, to))| {
                format!(r#""t{i}":{{"dtype":"F16","shape":[{a},{b}],"data_offsets":[{from},{to}]}}"#)
            }).collect();
            let bytes = file_of(&format!("{{{}}}", entries.join(",")), data);
            let mut spans: Vec<_> = tensors.iter().map(|t| (t.2, t.3)).collect();
            spans.sort_unstable();
            let sizes = tensors.iter().all(|(a, b, from, to)| from + 2 * a * b == *to);
            let chained = spans[0].0 == 0 && spans.windows(2).all(|w| w[0].1 == w[1].0);
            let fits = sizes && chained && spans[spans.len() - 1].1 == data as u64;
            prop_assert_eq!(parse(&bytes).is_ok(), fits);
        }
    }
}
