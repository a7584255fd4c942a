//! Old bytes of a file that is about to be changed in place, and their way back.

use super::files::{BLOCK, Named};
use crate::{Error, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::path::Path;

const MAGIC: &[u8; 8] = b"ABJOLD01";

/// Copies `ranges` (offset, length) of `source` to a new file `journal`, which is on the storage device on return.
///
/// # Errors
/// `Checkpoint` if a file cannot be read or written.
pub fn save(source: &Path, ranges: &[(u64, u64)], journal: &Path) -> Result<()> {
    let (from, to) = (Named::open(source)?, Named::create(journal)?);
    let (mut hash, mut buffer, mut at) = (Sha256::new(), vec![0; BLOCK], 8);
    to.write_at(0, MAGIC)?;
    for (begin, len) in ranges {
        let mut done = 0;
        while done < *len {
            let n = BLOCK.min((len - done) as usize);
            from.read_at(begin + done, &mut buffer[..n])?;
            hash.update(&buffer[..n]);
            to.write_at(at, &buffer[..n])?;
            (done, at) = (done + n as u64, at + n as u64);
        }
    }
    let file_len = from.size()?;
    let footer =
        json!({"ranges": ranges, "len": file_len, "sha256": super::files::hex(&hash.finalize())});
    let footer = footer.to_string();
    let mut end = footer.as_bytes().to_vec();
    end.extend((footer.len() as u64).to_le_bytes());
    end.extend(MAGIC);
    to.write_at(at, &end)?;
    to.sync()
}

/// Writes the bytes of `journal` back to `target`; may be done any number of times. The journal is checked first.
///
/// # Errors
/// `Checkpoint` if the journal is not whole, or `target` has another length than it had or cannot be written.
pub fn rollback(journal: &Path, target: &Path) -> Result<()> {
    let from = Named::open(journal)?;
    let bad = || Error::checkpoint(journal, "is no whole journal");
    let len = from.size()?;
    let end = len.checked_sub(16).ok_or_else(bad)?;
    let mut trailer = [0; 16];
    from.read_at(end, &mut trailer)?;
    let size = u64::from_le_bytes(std::array::from_fn(|i| trailer[i]));
    let at = (end.checked_sub(size)).filter(|a| *a >= 8 && &trailer[8..] == MAGIC);
    let at = at.ok_or_else(bad)?;
    let mut footer = vec![0; size as usize];
    from.read_at(at, &mut footer)?;
    let footer: Value = serde_json::from_slice(&footer).map_err(|_| bad())?;
    let ranges: Vec<(u64, u64)> =
        serde_json::from_value(footer["ranges"].clone()).map_err(|_| bad())?;
    if Some(at - 8) != ranges.iter().try_fold(0u64, |n, r| n.checked_add(r.1)) {
        return Err(bad());
    }
    let (mut hash, mut buffer, mut done) = (Sha256::new(), vec![0; BLOCK], 8);
    while done < at {
        let n = BLOCK.min((at - done) as usize);
        from.read_at(done, &mut buffer[..n])?;
        hash.update(&buffer[..n]);
        done += n as u64;
    }
    if footer["sha256"].as_str() != Some(&super::files::hex(&hash.finalize())) {
        return Err(bad());
    }
    let to = Named::modify(target)?;
    if Some(to.size()?) != footer["len"].as_u64() {
        let found = "has another length than when its old bytes were kept";
        return Err(Error::checkpoint(target, found));
    }
    let mut source = 8;
    for (begin, len) in ranges {
        let mut done = 0;
        while done < len {
            let n = BLOCK.min((len - done) as usize);
            from.read_at(source, &mut buffer[..n])?;
            to.write_at(begin + done, &buffer[..n])?;
            (done, source) = (done + n as u64, source + n as u64);
        }
    }
    to.sync()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_bytes_come_back() {
        let dir = std::env::temp_dir().join(format!("abjure-journal-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (file, journal) = (dir.join("a"), dir.join("j"));
        let before: Vec<u8> = (0..3 * BLOCK + 17).map(|i| (i * 7 % 251) as u8).collect();
        std::fs::write(&file, &before).unwrap();
        save(
            &file,
            &[(5, BLOCK as u64 + 9), (2 * BLOCK as u64, 40)],
            &journal,
        )
        .unwrap();
        let mut after = before.clone();
        after[5..5 + BLOCK + 9].fill(0);
        after[2 * BLOCK + 3] ^= 1;
        std::fs::write(&file, &after).unwrap();
        rollback(&journal, &file).unwrap();
        assert!(std::fs::read(&file).unwrap() == before);
        std::fs::write(&file, &after[1..]).unwrap();
        assert!(
            rollback(&journal, &file)
                .unwrap_err()
                .to_string()
                .contains("length")
        );
        let mut bytes = std::fs::read(&journal).unwrap();
        bytes[100] ^= 1;
        std::fs::write(&journal, &bytes).unwrap();
        assert!(
            rollback(&journal, &file)
                .unwrap_err()
                .to_string()
                .contains("journal")
        );
        std::fs::write(&journal, &bytes[..50]).unwrap();
        assert!(rollback(&journal, &file).is_err());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
