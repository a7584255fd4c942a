//! Tables from byte strings and from pairs of ids to ids, in the order of first sight.

use hashbrown::HashTable;

const A: u64 = 0x9e37_79b9_7f4a_7c15;
const B: u64 = 0xd1b5_4a32_d192_ed03;

#[inline(always)]
fn fold(a: u64, b: u64) -> u64 {
    let wide = u128::from(a) * u128::from(b);
    (wide as u64) ^ ((wide >> 64) as u64)
}

/// Hash of one word by a folded multiplication.
#[inline(always)]
pub fn hash_u64(v: u64) -> u64 {
    fold(v ^ A, B)
}

/// Hash of bytes, eight at a time.
#[inline(always)]
fn hash_bytes(bytes: &[u8]) -> u64 {
    let mut h = bytes.len() as u64 ^ A;
    let mut eights = bytes.chunks_exact(8);
    for part in &mut eights {
        let mut word = [0; 8];
        word.copy_from_slice(part);
        h = fold(h ^ u64::from_le_bytes(word), B);
    }
    let rest = eights.remainder();
    let mut word = [0; 8];
    word[..rest.len()].copy_from_slice(rest);
    fold(h ^ u64::from_le_bytes(word), A ^ B)
}

/// Distinct byte strings, numbered from 0.
#[derive(Debug, Clone, Default)]
pub struct Strings {
    table: HashTable<u32>,
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Strings {
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub fn get(&self, id: u32) -> &[u8] {
        slice(&self.bytes, &self.ends, id)
    }

    /// The number of a string that was seen before.
    #[inline]
    pub fn find(&self, s: &[u8]) -> Option<u32> {
        self.table
            .find(hash_bytes(s), |id| self.get(*id) == s)
            .copied()
    }

    /// The number of a string, a new one at its first sight.
    #[inline]
    pub fn intern(&mut self, s: &[u8]) -> u32 {
        let hash = hash_bytes(s);
        let (bytes, ends) = (&self.bytes, &self.ends);
        if let Some(id) = self.table.find(hash, |id| slice(bytes, ends, *id) == s) {
            return *id;
        }
        let id = self.ends.len() as u32;
        self.bytes.extend_from_slice(s);
        self.ends.push(self.bytes.len());
        let (bytes, ends) = (&self.bytes, &self.ends);
        self.table
            .insert_unique(hash, id, |id| hash_bytes(slice(bytes, ends, *id)));
        id
    }
}

#[inline]
fn slice<'a>(bytes: &'a [u8], ends: &[usize], id: u32) -> &'a [u8] {
    let start = match id {
        0 => 0,
        id => ends[id as usize - 1],
    };
    &bytes[start..ends[id as usize]]
}

/// Distinct 64-bit keys, numbered from 0.
#[derive(Debug, Clone, Default)]
pub struct Keys {
    table: HashTable<u32>,
    keys: Vec<u64>,
}

impl Keys {
    pub fn keys(&self) -> &[u64] {
        &self.keys
    }

    #[inline]
    pub fn find(&self, key: u64) -> Option<u32> {
        self.table
            .find(hash_u64(key), |id| self.keys[*id as usize] == key)
            .copied()
    }

    #[inline]
    pub fn intern(&mut self, key: u64) -> u32 {
        let keys = &self.keys;
        let hash = hash_u64(key);
        if let Some(id) = self.table.find(hash, |id| keys[*id as usize] == key) {
            return *id;
        }
        let id = self.keys.len() as u32;
        self.keys.push(key);
        let keys = &self.keys;
        self.table
            .insert_unique(hash, id, |id| hash_u64(keys[*id as usize]));
        id
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn numbers_follow_first_sight(words in proptest::collection::vec("[a-c]{0,20}", 0..300)) {
            let (mut strings, mut seen) = (Strings::default(), Vec::<String>::new());
            let (mut keys, mut seen_keys) = (Keys::default(), Vec::<u64>::new());
            for w in &words {
                let expected = seen.iter().position(|s| s == w).unwrap_or_else(|| { seen.push(w.clone()); seen.len() - 1 });
                prop_assert_eq!(strings.intern(w.as_bytes()), expected as u32);
                let key = w.len() as u64;
                let at = seen_keys.iter().position(|s| *s == key).unwrap_or_else(|| { seen_keys.push(key); seen_keys.len() - 1 });
                prop_assert_eq!(keys.intern(key), at as u32);
            }
            prop_assert_eq!((strings.len(), strings.is_empty()), (seen.len(), seen.is_empty()));
            for (i, s) in seen.iter().enumerate() {
                prop_assert_eq!(strings.get(i as u32), s.as_bytes());
                prop_assert_eq!(strings.find(s.as_bytes()), Some(i as u32));
            }
            prop_assert_eq!(strings.find(b"zz"), None);
            prop_assert_eq!(keys.find(999), None);
            prop_assert_eq!(keys.keys(), &seen_keys[..]);
        }
    }
}
