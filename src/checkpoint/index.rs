//! The files of a checkpoint: a directory with an index and shards, a directory with one file, or the file alone.

use super::files::reading;
use super::header::{Header, Object, read_header};
use crate::{Error, Result};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path, PathBuf};

/// Longest index that is read.
const MAX_INDEX: u64 = 100_000_000;
const INDEX: &str = ".safetensors.index.json";
const PICKLES: [&str; 6] = ["bin", "pt", "pth", "ckpt", "pkl", "pickle"];

/// One safetensors file of a checkpoint.
#[derive(Debug)]
pub struct Shard {
    /// Name inside the directory.
    pub name: String,
    pub header: Header,
}

/// A checkpoint whose files exist, are sound and agree with each other.
#[derive(Debug)]
pub struct Checkpoint {
    /// The directory the shards lie in.
    pub directory: PathBuf,
    pub shards: Vec<Shard>,
    /// Name of the index, if there is one.
    pub index: Option<String>,
}

/// The tensors of an index and the files they are said to be in, in the order of the text.
///
/// # Errors
/// `Checkpoint`: not JSON, no `weight_map`, a name twice, a file name that is not a plain name ending in
/// `.safetensors`.
pub fn parse_index(path: &Path, text: &[u8]) -> Result<Vec<(String, String)>> {
    let bad = |reason: String| Error::checkpoint(path, reason);
    let top: Object<Value> = serde_json::from_slice(text)
        .map_err(|e| bad(format!("is not an index of safetensors files: {e}")))?;
    if !top.0.iter().any(|(k, _)| k == "weight_map") {
        return Err(bad("has no weight_map".into()));
    }
    // Parsed again into the form that sees names that stand twice.
    struct Map(Vec<(String, String)>);
    impl<'de> serde::Deserialize<'de> for Map {
        fn deserialize<D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
            struct Top;
            impl<'de> serde::de::Visitor<'de> for Top {
                type Value = Map;
                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("an index")
                }
                fn visit_map<M: serde::de::MapAccess<'de>>(
                    self,
                    mut map: M,
                ) -> std::result::Result<Map, M::Error> {
                    let mut found = Vec::new();
                    while let Some(key) = map.next_key::<String>()? {
                        if key == "weight_map" {
                            found = map.next_value::<Object<String>>()?.0;
                        } else {
                            map.next_value::<serde::de::IgnoredAny>()?;
                        }
                    }
                    Ok(Map(found))
                }
            }
            d.deserialize_map(Top)
        }
    }
    let map: Map = serde_json::from_slice(text).map_err(|e| bad(format!("weight_map: {e}")))?;
    if map.0.is_empty() {
        return Err(bad("its weight_map is empty".into()));
    }
    for (tensor, file) in &map.0 {
        plain_name(file)
            .map_err(|reason| bad(format!("tensor {tensor:?}: file {file:?} {reason}")))?;
    }
    Ok(map.0)
}

/// A name is taken only if it cannot point out of the directory.
fn plain_name(name: &str) -> std::result::Result<(), &'static str> {
    let mut parts = Path::new(name).components();
    let plain =
        matches!((parts.next(), parts.next()), (Some(Component::Normal(p)), None) if p == name);
    if !plain || name.contains(['/', '\\', '\0', ':']) || name.starts_with('.') {
        return Err("is not a plain file name");
    }
    if !name.ends_with(".safetensors") {
        return Err("is no safetensors file; pickles are refused and never loaded");
    }
    Ok(())
}

/// Symbolic links may stay inside the directory, or lead to the blobs of a Hugging Face cache, whose snapshots consist
/// of links.
fn check_link(directory: &Path, name: &str) -> Result<()> {
    let path = directory.join(name);
    let meta = std::fs::symlink_metadata(&path).map_err(|e| {
        if e.kind() == std::io::ErrorKind::NotFound {
            return Error::checkpoint(&path, "is named by the index but missing");
        }
        reading(&path, &e)
    })?;
    if !meta.is_symlink() {
        return Ok(());
    }
    let canonical = |p: &Path| std::fs::canonicalize(p).map_err(|e| reading(p, &e));
    let (home, target) = (canonical(directory)?, canonical(&path)?);
    let blobs = (home.parent())
        .filter(|p| p.file_name().is_some_and(|n| n == "snapshots"))
        .and_then(Path::parent)
        .map(|p| p.join("blobs"));
    let parent = target.parent();
    if parent == Some(&home) || (blobs.is_some() && parent == blobs.as_deref()) {
        return Ok(());
    }
    Err(Error::checkpoint(
        &path,
        "is a symbolic link that leads out of the checkpoint",
    ))
}

/// Opens a checkpoint and checks every header.
///
/// # Errors
/// `Checkpoint`, with the file and what is wrong with it.
pub fn open(path: &Path) -> Result<Checkpoint> {
    let meta = std::fs::metadata(path).map_err(|e| reading(path, &e))?;
    if meta.is_dir() {
        return open_directory(path);
    }
    let directory = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p.to_owned(),
        _ => PathBuf::from("."),
    };
    let name = (path.file_name().and_then(|n| n.to_str()))
        .ok_or_else(|| Error::checkpoint(path, "expected a file name in UTF-8"))?;
    if name.ends_with(INDEX) {
        return with_index(directory, name);
    }
    if !name.ends_with(".safetensors") {
        // The content decides what is said about it.
        read_header(path)?;
        return Err(Error::checkpoint(
            path,
            "expected a name ending in .safetensors",
        ));
    }
    with_file(directory, name)
}

fn with_file(directory: PathBuf, name: &str) -> Result<Checkpoint> {
    check_link(&directory, name)?;
    let shard = Shard {
        name: name.to_owned(),
        header: read_header(&directory.join(name))?,
    };
    Ok(Checkpoint {
        directory,
        shards: vec![shard],
        index: None,
    })
}

fn open_directory(path: &Path) -> Result<Checkpoint> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path).map_err(|e| reading(path, &e))? {
        let entry = entry.map_err(|e| reading(path, &e))?;
        names.extend(entry.file_name().to_str().map(str::to_owned));
    }
    names.sort();
    let indices: Vec<_> = names.iter().filter(|n| n.ends_with(INDEX)).collect();
    let files: Vec<_> = names
        .iter()
        .filter(|n| n.ends_with(".safetensors"))
        .collect();
    let usual = |n: &String| n.starts_with("model.");
    let (one, index) = (
        files
            .iter()
            .find(|n| usual(n))
            .or(files.first().filter(|_| files.len() == 1)),
        indices
            .iter()
            .find(|n| usual(n))
            .or(indices.first().filter(|_| indices.len() == 1)),
    );
    match (index, one) {
        (Some(index), Some(file)) if usual(file) && usual(index) => {
            let both =
                format!("holds both {file} and {index}, and loaders differ in which they take");
            Err(Error::checkpoint(path, format!("{both}; remove one")))
        }
        (Some(index), _) => with_index(path.to_owned(), index),
        (None, Some(file)) if indices.is_empty() => with_file(path.to_owned(), file),
        _ if !files.is_empty() => {
            let found = format!(
                "{} safetensors files and {} indices",
                files.len(),
                indices.len()
            );
            Err(Error::checkpoint(
                path,
                format!("expected one index, got {found}"),
            ))
        }
        _ => {
            let pickle = |n: &&String| PICKLES.iter().any(|p| n.ends_with(&format!(".{p}")));
            let reason = match names.iter().find(pickle) {
                Some(n) => format!(
                    "holds no safetensors file, only pickles ({n}), which are refused and never loaded; convert it first"
                ),
                None => "holds no safetensors file".into(),
            };
            Err(Error::checkpoint(path, reason))
        }
    }
}

fn with_index(directory: PathBuf, name: &str) -> Result<Checkpoint> {
    let path = directory.join(name);
    let len = std::fs::metadata(&path)
        .map_err(|e| reading(&path, &e))?
        .len();
    if len > MAX_INDEX {
        return Err(Error::checkpoint(
            &path,
            format!("{len} bytes are too many for an index"),
        ));
    }
    let text = std::fs::read(&path).map_err(|e| reading(&path, &e))?;
    let map = parse_index(&path, &text)?;
    let mut by_file: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, file) in &map {
        by_file.entry(file).or_default().push(tensor);
    }
    let mut shards = Vec::new();
    let mut home: HashMap<String, String> = HashMap::new();
    for (file, tensors) in by_file {
        check_link(&directory, file)?;
        let shard = directory.join(file);
        let header = read_header(&shard)?;
        for t in &header.tensors {
            if let Some(other) = home.insert(t.name.clone(), file.to_owned()) {
                let found = format!("tensor {:?} stands in {other} too", t.name);
                return Err(Error::checkpoint(&shard, found));
            }
        }
        let listed: std::collections::HashSet<_> = tensors.iter().copied().collect();
        if let Some(missing) = tensors.iter().find(|t| header.tensor(t).is_none()) {
            let found = format!("the index says that it holds {missing:?}, which it does not");
            return Err(Error::checkpoint(&shard, found));
        }
        if let Some(extra) = header
            .tensors
            .iter()
            .find(|t| !listed.contains(&t.name[..]))
        {
            let found = format!(
                "it holds {:?}, which the index does not list there",
                extra.name
            );
            return Err(Error::checkpoint(&shard, found));
        }
        shards.push(Shard {
            name: file.to_owned(),
            header,
        });
    }
    Ok(Checkpoint {
        directory,
        shards,
        index: Some(name.to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use super::super::header::tests::{file_of, sound as sound_header};
    use super::*;
    use crate::random::Random;
    use proptest::prelude::*;
    use std::time::{Duration, Instant};

    fn index(text: &str) -> Result<Vec<(String, String)>> {
        parse_index(Path::new("i.json"), text.as_bytes())
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in [
            "../a.safetensors",
            "/etc/a.safetensors",
            "b/a.safetensors",
            "..",
            "",
            "./a.safetensors",
            "a\\\\b.safetensors",
            "C:a.safetensors",
            "a.safetensors/",
            ".a.safetensors",
            "a\\u0000.safetensors",
        ] {
            let err = index(&format!(r#"{{"weight_map":{{"t":"{name}"}}}}"#)).unwrap_err();
            assert!(err.to_string().contains("plain file name"), "{name} {err}");
        }
        let err = index(r#"{"weight_map":{"t":"pytorch_model.bin"}}"#).unwrap_err();
        assert!(err.to_string().contains("pickles"));
    }

    #[test]
    fn what_an_index_must_be() {
        for (text, wanted) in [
            ("", "not an index"),
            ("[]", "not an index"),
            ("{}", "no weight_map"),
            (r#"{"weight_map":[]}"#, "weight_map"),
            (r#"{"weight_map":{}}"#, "empty"),
            (r#"{"weight_map":{"a":1}}"#, "weight_map"),
            (
                r#"{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}"#,
                "twice",
            ),
            (r#"{"weight_map":{},"weight_map":{}}"#, "twice"),
        ] {
            let err = index(text).unwrap_err().to_string();
            assert!(err.contains(wanted), "{err} | {wanted}");
        }
        let good = r#"{"metadata":{"total_size":4},"weight_map":{"b":"x.safetensors","a":"y.safetensors"}}"#;
        assert_eq!(
            index(good).unwrap()[1],
            ("a".into(), "y.safetensors".into())
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]
        /// Whatever is accepted names plain files only.
        #[test]
        fn mutated_indices(
            edits in proptest::collection::vec((any::<prop::sample::Index>(), 0usize..3, any::<u8>()), 1..6),
        ) {
            let mut text = br#"{"weight_map":{"a":"x.safetensors","b":"x.safetensors"}}"#.to_vec();
            for (at, kind, value) in edits {
                let i = at.index(text.len());
                match kind {
                    0 => text[i] = b"./\\\"{}:,ax"[usize::from(value) % 10],
                    1 => drop(text.remove(i)),
                    _ => text.insert(i, text[i]),
                }
            }
            if let Ok(map) = parse_index(Path::new("i"), &text) {
                for (_, file) in map {
                    prop_assert!(plain_name(&file).is_ok());
                    prop_assert!(Path::new("/d").join(&file).parent() == Some(Path::new("/d")));
                }
            }
        }
    }

    /// Bytes changed, cut out, doubled, and put in from a list of what parsers trip over.
    fn mutate(random: &mut Random, bytes: &mut Vec<u8>) {
        const WORDS: [&str; 16] = [
            "\"weight_map\":",
            "\"../a.safetensors\"",
            "\"data_offsets\":[0,4]",
            "\"dtype\":\"F4\"",
            "\"__metadata__\":{",
            "18446744073709551615",
            "-1",
            "1e400",
            "[[[[[[[[",
            "\\u0000",
            "\u{feff}",
            "null",
            "\"shape\":[]",
            "\"x.safetensors\"",
            "}",
            "\"",
        ];
        for _ in 0..1 + random.below(4) {
            let n = bytes.len();
            let (from, value) = (random.below(n + 1), random.bits() as u8);
            let to = (from + random.below(12)).min(n);
            match random.below(6) {
                0 if from < n => bytes[from] = value,
                1 if from < n => bytes[from] ^= 1 << (value % 8),
                2 => drop(bytes.drain(from..to)),
                3 => {
                    let piece = bytes[from..to].to_vec();
                    bytes.splice(from..from, piece);
                }
                4 => bytes.truncate(from),
                _ => {
                    let word = WORDS[random.below(WORDS.len())].bytes();
                    bytes.splice(from..(from + random.below(3)).min(n), word);
                }
            }
        }
    }

    /// A fuzz target over index and headers together, for one second: nothing panics, and what opens is sound.
    #[test]
    fn fuzzed_directories() {
        let dir = std::env::temp_dir().join(format!("abjure-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1,2],"data_offsets":[4,12]}}"#;
        let sound = [
            br#"{"metadata":{"total_size":16},"weight_map":{"a":"x.safetensors","b":"x.safetensors","c":"y.safetensors"}}"#.to_vec(),
            file_of(header, 12),
            file_of(r#"{"c":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#, 4),
        ];
        let names = [
            "model.safetensors.index.json",
            "x.safetensors",
            "y.safetensors",
        ];
        let mut random = Random::new(7);
        let (mut opened, mut refused) = (0, 0);
        let end = Instant::now() + Duration::from_secs(1);
        while Instant::now() < end {
            let mut files = sound.clone();
            for _ in 0..random.below(3) {
                let which = random.below(3);
                mutate(&mut random, &mut files[which]);
            }
            for (name, bytes) in names.iter().zip(&files) {
                std::fs::write(dir.join(name), bytes).unwrap();
            }
            let Ok(found) = open(&dir) else {
                refused += 1;
                continue;
            };
            opened += 1;
            assert!(found.index.is_some());
            for shard in &found.shards {
                let len = std::fs::metadata(dir.join(&shard.name)).unwrap().len();
                sound_header(&shard.header, len);
            }
            let mut seen = std::collections::HashSet::new();
            let tensors = found.shards.iter().flat_map(|s| &s.header.tensors);
            assert!(tensors.into_iter().all(|t| seen.insert(&t.name)));
        }
        assert!(opened > 10 && refused > 10, "{opened} {refused}");
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_directory_is_checked_against_its_index() {
        let dir = std::env::temp_dir().join(format!("abjure-index-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let one = |n: &str| {
            file_of(
                &format!(r#"{{"{n}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#),
                4,
            )
        };
        let write = |name: &str, bytes: &[u8]| std::fs::write(dir.join(name), bytes).unwrap();
        let complaint = || open(&dir).unwrap_err().to_string();
        write("pytorch_model.bin", b"PK");
        assert!(complaint().contains("only pickles"));
        write("x.safetensors", &one("a"));
        assert_eq!(open(&dir).unwrap().shards[0].name, "x.safetensors");
        write("y.safetensors", &one("b"));
        assert!(complaint().contains("expected one index"));
        let index = |text: &str| write("model.safetensors.index.json", text.as_bytes());
        index(r#"{"weight_map":{"a":"x.safetensors","b":"y.safetensors"}}"#);
        assert_eq!(open(&dir).unwrap().shards.len(), 2);
        index(r#"{"weight_map":{"a":"x.safetensors","b":"z.safetensors"}}"#);
        assert!(complaint().contains("missing"));
        index(r#"{"weight_map":{"a":"x.safetensors","c":"y.safetensors"}}"#);
        assert!(complaint().contains("which it does not"));
        index(r#"{"weight_map":{"a":"x.safetensors"}}"#);
        write(
            "x.safetensors",
            &file_of(
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#,
                4,
            ),
        );
        assert!(complaint().contains("does not list"));
        write("x.safetensors", &one("b"));
        index(r#"{"weight_map":{"b":"x.safetensors","c":"y.safetensors"}}"#);
        assert!(complaint().contains("stands in x.safetensors too"));
        write("model.safetensors", &one("a"));
        assert!(complaint().contains("holds both"));
        #[cfg(unix)]
        {
            std::fs::remove_file(dir.join("model.safetensors")).unwrap();
            index(r#"{"weight_map":{"q":"l.safetensors"}}"#);
            let outside = dir.with_extension("outside");
            std::fs::write(&outside, one("q")).unwrap();
            std::os::unix::fs::symlink(&outside, dir.join("l.safetensors")).unwrap();
            assert!(complaint().contains("leads out"));
            std::fs::remove_file(&outside).unwrap();
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
