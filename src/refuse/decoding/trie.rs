//! The trie with suffix links of Aho and Corasick (1975), over any alphabet, and the checks of phrases that go into it.

use crate::{Error, Result};
use std::collections::VecDeque;
use std::ops::Range;

pub const ROOT: u32 = 0;
const NONE: u32 = u32::MAX;
/// Faulty phrases named in a message.
const NAMED: usize = 8;

#[derive(Debug, Clone, Copy)]
struct Node {
    first_child: u32,
    children: u32,
    /// Longest proper suffix that is a node.
    link: u32,
    /// Nearest node on the suffix chain, this one included, that writes anything.
    out: u32,
}

/// What phrases are made of.
pub trait Symbol: Copy + Ord + Default {
    /// Its place in a table.
    fn index(self) -> usize;
}

impl Symbol for u32 {
    fn index(self) -> usize {
        self as usize
    }
}

impl Symbol for u16 {
    fn index(self) -> usize {
        usize::from(self)
    }
}

/// Children of the root from which on it has a table: every search then begins with one access and not with a dozen,
/// each of which misses the cache where a model ran since the last step.
const WIDE: usize = 32;
/// Entries of the largest table: more than any vocabulary has, and less than an id given by mistake may ask for.
const TABLE: usize = 1 << 22;

/// Nodes are in breadth-first order, the children of a node contiguous and ascending.
#[derive(Debug)]
pub struct Trie<S> {
    nodes: Vec<Node>,
    /// Symbol on the edge into each node.
    symbols: Vec<S>,
    /// The root's child by symbol, or [`ROOT`]; empty where the root has few.
    first: Vec<u32>,
}

/// The phrases that pass through a node.
#[derive(Debug, Clone, Copy)]
pub struct Through {
    /// Length of the shortest.
    pub shortest: u32,
    /// One ends here.
    pub ends: bool,
}

impl<S: Symbol> Trie<S> {
    /// The trie of phrases in ascending order without repeats, with what passes through each node; `lengths` is what
    /// counts as the length of each.
    pub fn new(sorted: &[Vec<S>], lengths: &[u32]) -> (Self, Vec<Through>) {
        let mut trie = Self {
            nodes: Vec::new(),
            symbols: Vec::new(),
            first: Vec::new(),
        };
        let through = trie.grow(sorted, lengths);
        trie.widen();
        trie.link();
        (trie, through)
    }

    fn grow(&mut self, sorted: &[Vec<S>], lengths: &[u32]) -> Vec<Through> {
        let mut found = Vec::new();
        let mut queue = VecDeque::from([(S::default(), 0, 0..sorted.len())]);
        while let Some((symbol, depth, phrases)) = queue.pop_front() {
            let ends = sorted[phrases.start].len() == depth;
            let shortest = lengths[phrases.clone()].iter().copied().min();
            found.push(Through {
                shortest: shortest.unwrap_or(0),
                ends,
            });
            let first_child = (self.nodes.len() + 1 + queue.len()) as u32;
            let before = queue.len();
            let mut start = phrases.start + usize::from(ends);
            while start < phrases.end {
                let next = sorted[start][depth];
                let same = sorted[start..phrases.end].partition_point(|p| p[depth] == next);
                queue.push_back((next, depth + 1, start..start + same));
                start += same;
            }
            self.symbols.push(symbol);
            self.nodes.push(Node {
                first_child,
                children: (queue.len() - before) as u32,
                link: ROOT,
                out: NONE,
            });
        }
        found
    }

    fn widen(&mut self) {
        let children = self.children(ROOT);
        let last = children.end.saturating_sub(1);
        let size = self.symbols[last].index().saturating_add(1);
        if children.len() < WIDE || size > TABLE {
            return;
        }
        self.first = vec![ROOT; size];
        for child in children {
            self.first[self.symbols[child].index()] = child as u32;
        }
    }

    fn link(&mut self) {
        for node in 0..self.nodes.len() as u32 {
            for child in self.children(node) {
                self.nodes[child].link = match node {
                    ROOT => ROOT,
                    _ => self.step(self.nodes[node as usize].link, self.symbols[child]),
                };
            }
        }
    }

    /// Says which nodes write something.
    pub fn mark(&mut self, writes: impl Fn(usize) -> bool) {
        for node in 1..self.nodes.len() {
            self.nodes[node].out = match writes(node) {
                true => node as u32,
                false => self.nodes[self.nodes[node].link as usize].out,
            };
        }
    }

    /// The marked nodes on the suffix chain of `state`, longest first.
    pub fn marked(&self, state: u32) -> impl Iterator<Item = usize> {
        let mut node = self.nodes[state as usize].out;
        std::iter::from_fn(move || {
            let found = (node != NONE).then_some(node as usize)?;
            node = self.nodes[self.nodes[found].link as usize].out;
            Some(found)
        })
    }

    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    pub fn bytes(&self) -> usize {
        self.nodes.len() * (size_of::<Node>() + size_of::<S>()) + size_of_val(&self.first[..])
    }

    pub fn children(&self, node: u32) -> Range<usize> {
        let n = self.nodes[node as usize];
        n.first_child as usize..(n.first_child + n.children) as usize
    }

    pub fn suffix(&self, node: usize) -> usize {
        self.nodes[node].link as usize
    }

    pub fn symbol(&self, node: usize) -> S {
        self.symbols[node]
    }

    pub fn child(&self, node: u32, symbol: S) -> Option<u32> {
        let range = self.children(node);
        let at = self.symbols[range.clone()].binary_search(&symbol).ok()?;
        Some((range.start + at) as u32)
    }

    /// State after `symbol` in `state`.
    pub fn step(&self, mut state: u32, symbol: S) -> u32 {
        loop {
            if state == ROOT && !self.first.is_empty() {
                return self.first.get(symbol.index()).copied().unwrap_or(ROOT);
            }
            if let Some(next) = self.child(state, symbol) {
                return next;
            }
            if state == ROOT {
                return ROOT;
            }
            state = self.nodes[state as usize].link;
        }
    }
}

/// The error for `phrases` unless `faulty` is empty, naming the indices.
pub fn expect_none(expected: &str, faulty: &[usize]) -> Result<()> {
    if faulty.is_empty() {
        return Ok(());
    }
    let named: Vec<_> = faulty.iter().take(NAMED).map(usize::to_string).collect();
    let more = match faulty.len().saturating_sub(NAMED) {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    let found = format!("otherwise at indices {}{more}", named.join(", "));
    Err(Error::value("phrases", expected, found))
}

/// Indices of the phrases that `bad` holds for.
pub fn which<P>(phrases: &[P], bad: impl Fn(&P) -> bool) -> Vec<usize> {
    let all = phrases.iter().enumerate();
    all.filter(|(_, p)| bad(p)).map(|(i, _)| i).collect()
}

/// Checks that there are phrases, none empty and none longer than `max_length` of `unit`.
pub fn expect_lengths<P: AsRef<[T]>, T>(
    phrases: &[P],
    max_length: usize,
    unit: &str,
) -> Result<()> {
    if phrases.is_empty() {
        return Err(Error::value("phrases", "at least one phrase", "none"));
    }
    expect_none(
        &format!("at least one {unit} in each phrase"),
        &which(phrases, |p| p.as_ref().is_empty()),
    )?;
    expect_none(
        &format!("at most {max_length} {unit}s in each phrase"),
        &which(phrases, |p| p.as_ref().len() > max_length),
    )
}

/// Phrases in ascending order, each of which must be there once.
pub fn sorted_once<S: Ord>(phrases: impl Iterator<Item = Vec<S>>) -> Result<Vec<Vec<S>>> {
    let mut sorted: Vec<(Vec<S>, usize)> = phrases.zip(0..).collect();
    sorted.sort();
    let twice = sorted.windows(2).filter(|w| w[0].0 == w[1].0);
    let mut twice: Vec<usize> = twice.map(|w| w[1].1).collect();
    twice.sort_unstable();
    expect_none("each phrase once", &twice)?;
    Ok(sorted.into_iter().map(|(p, _)| p).collect())
}
