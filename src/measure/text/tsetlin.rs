//! The Tsetlin Machine: classes as votes of conjunctions, each literal of which a small automaton keeps in or out.
//!
//! Granmo 2018 (arXiv 1804.01508) with weighted clauses (arXiv 1911.12607) and a budget of literals (arXiv 2301.08190), in
//! the form that pyTsetlinMachine gave it: clauses of even number vote for their class, the others against, an automaton
//! takes its literal in from the middle of its states on, and an example teaches its own class and one other, drawn.
//!
//! The states of 64 automata lie across words, one per bit of the state, so that a step is a ripple of carries over whole
//! words; the highest of them is the mask of literals taken in. Automata at their lowest state, most of them where examples
//! are sparse, are kept in one more mask, and words that hold nothing else are passed over, random numbers and all.
//!
//! Which other class an example teaches is drawn before anything is learned, so that no class needs another: each is a task
//! of its own. Random numbers are a function of seed, epoch, class and place in the epoch, and the number of threads changes
//! no bit.

use crate::cancel::Cancel;
use crate::simd::{Kernel, dispatch};
use crate::{Error, Result, par};

/// Rows whose votes are counted together, a bit for each.
const BATCH: usize = 512;
const BATCH_WORDS: usize = BATCH / 64;

/// How to learn.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    pub classes: usize,
    /// Bits of an example; with `negations` there are twice as many literals.
    pub features: usize,
    /// Per class, an even number.
    pub clauses: usize,
    /// T: votes at which a class has learned enough.
    pub threshold: u32,
    /// s: a literal is forgotten with probability 1/s.
    pub s: f64,
    /// True literals of a clause that fires step towards inclusion always, not with probability (s - 1)/s.
    pub boost: bool,
    pub negations: bool,
    pub weighted: bool,
    /// Literals above which a clause gets no more.
    pub max_literals: usize,
    /// Bits of an automaton's state, 2 to 8.
    pub state_bits: usize,
    pub shuffle: bool,
    pub seed: u64,
}

impl Options {
    /// # Errors
    /// `Value`, `Degenerate`: a number outside its domain.
    pub fn check(&self) -> Result<()> {
        if self.classes < 2 {
            let reason = "expected labels of at least two classes";
            return Err(Error::degenerate("y", reason));
        }
        if self.features == 0 {
            return Err(Error::shape("x", "rows of at least one bit", 0));
        }
        if self.clauses == 0 || !self.clauses.is_multiple_of(2) {
            return Err(Error::value(
                "clauses",
                "an even number from 2",
                self.clauses,
            ));
        }
        if self.threshold == 0 || self.threshold > i32::MAX as u32 / 2 {
            return Err(Error::value("threshold", "1 to 2^30", self.threshold));
        }
        if !(self.s >= 1.0 && self.s.is_finite()) {
            return Err(Error::value("s", "a finite number from 1", self.s));
        }
        if !(2..=8).contains(&self.state_bits) {
            return Err(Error::value("state_bits", "2 to 8", self.state_bits));
        }
        if self.max_literals == 0 {
            return Err(Error::value("max_literals", "1 or more", 0));
        }
        Ok(())
    }

    pub fn literals(&self) -> usize {
        self.features * if self.negations { 2 } else { 1 }
    }

    fn shape(&self) -> Shape {
        Shape::of(self.literals())
    }
}

/// Words of a row of literals: a multiple of the words that are worked on at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    words: usize,
    lanes: usize,
    /// Bits in use of the last words.
    literals: usize,
}

impl Shape {
    fn of(literals: usize) -> Self {
        let words = literals.div_ceil(64).max(1);
        let lanes = match words {
            0..=2 => 2,
            3..=4 => 4,
            _ => 8,
        };
        Self {
            words: words.next_multiple_of(lanes),
            lanes,
            literals,
        }
    }

    /// Bits of word `w` that stand for literals.
    #[inline(always)]
    fn valid(self, w: usize) -> u64 {
        let left = self.literals.saturating_sub(64 * w);
        if left >= 64 {
            u64::MAX
        } else {
            (1 << left) - 1
        }
    }
}

/// Examples as rows of literals: the bits, and with negations their opposites after them.
#[derive(Debug, Clone, PartialEq)]
pub struct Literals {
    features: usize,
    negations: bool,
    shape: Shape,
    rows: usize,
    bits: Vec<u64>,
}

impl Literals {
    /// `set(row, mark)` calls `mark` with each feature that is 1.
    pub fn new(
        rows: usize,
        features: usize,
        negations: bool,
        set: impl Fn(usize, &mut dyn FnMut(usize)) + Sync,
    ) -> Self {
        let shape = Shape::of(features * if negations { 2 } else { 1 });
        let words = shape.words;
        let parts = par::map(rows * words * 8, par::ranges(rows, 256), |range| {
            let mut bits = vec![0u64; range.len() * words];
            for (line, row) in bits.chunks_exact_mut(words).zip(range) {
                if negations {
                    (features..2 * features).for_each(|j| line[j / 64] |= 1 << (j % 64));
                }
                set(row, &mut |j| {
                    line[j / 64] |= 1 << (j % 64);
                    if negations {
                        let k = features + j;
                        line[k / 64] &= !(1 << (k % 64));
                    }
                });
            }
            bits
        });
        Self {
            features,
            negations,
            shape,
            rows,
            bits: parts.concat(),
        }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    #[inline(always)]
    fn row(&self, i: usize) -> &[u64] {
        &self.bits[i * self.shape.words..(i + 1) * self.shape.words]
    }
}

#[inline(always)]
fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// One number from several, by SplitMix64's finaliser.
fn key(parts: &[u64]) -> u64 {
    (parts.iter()).fold(0, |h, v| mix((h ^ v).wrapping_add(GOLDEN)))
}

/// `N` generators xoshiro256++ (Blackman and Vigna 2018) side by side, started by SplitMix64.
#[derive(Debug, Clone)]
struct Random<const N: usize>([[u64; N]; 4]);

impl<const N: usize> Random<N> {
    #[inline(always)]
    fn new(key: u64) -> Self {
        let mut state = [[0; N]; 4];
        for (i, word) in state.iter_mut().flatten().enumerate() {
            *word = mix(key.wrapping_add(GOLDEN.wrapping_mul(i as u64 + 1)));
        }
        Self(state)
    }

    #[inline(always)]
    fn next(&mut self) -> [u64; N] {
        let [a, b, c, d] = &mut self.0;
        let mut out = [0; N];
        for i in 0..N {
            out[i] = a[i].wrapping_add(d[i]).rotate_left(23).wrapping_add(a[i]);
            let t = b[i] << 17;
            c[i] ^= a[i];
            d[i] ^= b[i];
            b[i] ^= c[i];
            a[i] ^= d[i];
            c[i] ^= t;
            d[i] = d[i].rotate_left(45);
        }
        out
    }
}

/// A probability as a binary fraction, so that masks of bits with it can be drawn from whole words: from the last digit to
/// the first, a digit 1 adds a random word, a digit 0 takes one away.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Fraction {
    digits: u32,
    count: u32,
}

impl Fraction {
    /// The shortest within a two-hundredth of `p`, at most 24 digits.
    fn of(p: f64) -> Self {
        for count in 1..=24u32 {
            let scale = f64::from(1u32 << count);
            let digits = (p * scale).round();
            if (digits / scale - p).abs() <= p / 200.0 && digits < scale {
                return Self {
                    digits: digits as u32,
                    count,
                };
            }
        }
        // Above all but the last of 24 digits: always, or never.
        Self {
            digits: if p > 0.5 { 1 << 24 } else { 0 },
            count: 24,
        }
    }

    #[cfg(test)]
    fn value(self) -> f64 {
        f64::from(self.digits) / f64::from(1u32 << self.count)
    }

    #[inline(always)]
    fn mask<const N: usize>(self, random: &mut Random<N>) -> [u64; N] {
        if self.digits >> self.count == 1 {
            return [u64::MAX; N];
        }
        let mut out = [0; N];
        for i in self.digits.trailing_zeros().min(self.count)..self.count {
            let word = random.next();
            let add = u64::from(self.digits >> i & 1).wrapping_neg();
            for (o, r) in out.iter_mut().zip(word) {
                // or where the digit is 1, else and.
                *o = (*o & r) | (add & (*o | r));
            }
        }
        out
    }
}

/// The clauses of one class.
#[derive(Debug, Clone, PartialEq)]
struct Bank {
    /// Literals taken in, by clause: the highest bit of each state.
    include: Vec<u64>,
    /// The lower bits of the states by clause, group of words and bit, after them the mask of automata at state 0.
    lower: Vec<u64>,
    /// Which words of `include` are not 0, by clause.
    live: Vec<u64>,
    /// Literals taken in, by clause.
    held: Vec<u32>,
    weights: Vec<u32>,
}

impl Bank {
    fn new(options: &Options) -> Self {
        let (shape, clauses) = (options.shape(), options.clauses);
        let lower = options.state_bits - 1;
        let mut bank = Self {
            include: vec![0; clauses * shape.words],
            lower: vec![0; clauses * shape.words * (lower + 1)],
            live: vec![0; clauses * shape.words.div_ceil(64)],
            held: vec![0; clauses],
            weights: vec![1; clauses],
        };
        let middle = (1 << lower) - 1;
        for clause in 0..clauses {
            bank.set(options, clause, |_| middle);
        }
        bank
    }

    /// Puts the automata of a clause into the states given.
    fn set(&mut self, options: &Options, clause: usize, state: impl Fn(usize) -> u8) {
        let (shape, lower) = (options.shape(), options.state_bits - 1);
        let per = shape.lanes * (lower + 1);
        self.held[clause] = 0;
        for w in 0..shape.words {
            let base = clause * shape.words * (lower + 1) + w / shape.lanes * per + w % shape.lanes;
            let mut words = [0u64; 9];
            // What stands for no literal stays at 0, where nothing moves it.
            let mut zero = !shape.valid(w);
            for bit in 0..64.min(shape.literals.saturating_sub(64 * w)) {
                let value = state(64 * w + bit);
                zero |= u64::from(value == 0) << bit;
                for (p, word) in words.iter_mut().enumerate() {
                    *word |= u64::from(u32::from(value) >> p & 1) << bit;
                }
            }
            for (p, word) in words.iter().enumerate().take(lower) {
                self.lower[base + p * shape.lanes] = *word;
            }
            self.lower[base + lower * shape.lanes] = zero;
            let include = words[lower];
            self.include[clause * shape.words + w] = include;
            self.held[clause] += include.count_ones();
            let live = &mut self.live[clause * shape.words.div_ceil(64) + w / 64];
            *live = *live & !(1 << (w % 64)) | u64::from(include != 0) << (w % 64);
        }
    }

    fn state(&self, options: &Options, clause: usize, literal: usize) -> u8 {
        let (shape, lower) = (options.shape(), options.state_bits - 1);
        let (w, bit) = (literal / 64, literal % 64);
        let per = shape.lanes * (lower + 1);
        let base = clause * shape.words * (lower + 1) + w / shape.lanes * per + w % shape.lanes;
        let low = (0..lower).map(|p| (self.lower[base + p * shape.lanes] >> bit & 1) << p);
        let top = (self.include[clause * shape.words + w] >> bit & 1) << lower;
        (low.sum::<u64>() | top) as u8
    }
}

/// Examples that teach one class: row, place in the epoch, whether it is of the class.
type Lesson = (u32, u32, bool);

struct Learn<'a, const N: usize> {
    options: &'a Options,
    forget: Fraction,
    bank: &'a mut Bank,
    x: &'a Literals,
    lessons: &'a [Lesson],
    key: u64,
    cancel: &'a Cancel,
}

impl<const N: usize> Kernel for Learn<'_, N> {
    type Output = Result<()>;
    #[inline(always)]
    fn run(self) -> Result<()> {
        let o = self.options;
        let mut fires = vec![false; o.clauses];
        for (row, place, own) in self.lessons.iter().copied() {
            if place % 64 == 0 {
                self.cancel.check()?;
            }
            let x = self.x.row(row as usize);
            let t = i64::from(o.threshold);
            let votes = vote(o, self.bank, x, &mut fires).clamp(-t, t);
            let chance = chance(own, votes, t);
            if chance == 0 {
                continue;
            }
            let mut random = Random::<N>::new(key(&[self.key, u64::from(place)]));
            let mut clause = 0;
            while clause < o.clauses {
                let words = random.next();
                for half in words.into_iter().flat_map(|w| [w & 0xffff_ffff, w >> 32]) {
                    if clause == o.clauses {
                        break;
                    }
                    if half < chance {
                        let first = (clause % 2 == 0) == own;
                        let mut one = Clause::<N>::of(o, self.bank, clause);
                        match (first, fires[clause]) {
                            (true, true) if one.held() <= o.max_literals => {
                                one.recognise(x, o.boost, self.forget, &mut random);
                                if o.weighted {
                                    let w = &mut self.bank.weights[clause];
                                    *w = w.saturating_add(1);
                                }
                            }
                            (true, _) => one.forget(self.forget, &mut random),
                            (false, true) => {
                                one.reject(x);
                                if o.weighted {
                                    let w = &mut self.bank.weights[clause];
                                    *w = (*w - 1).max(1);
                                }
                            }
                            (false, false) => {}
                        }
                    }
                    clause += 1;
                }
            }
        }
        Ok(())
    }
}

/// How likely a clause is taught, of 2^32: (T - v)/2T by an example of the class, (T + v)/2T by one of another.
#[inline(always)]
fn chance(own: bool, votes: i64, t: i64) -> u64 {
    let missing = if own { t - votes } else { t + votes };
    ((missing as u64) << 32) / (2 * t as u64)
}

/// Which clauses fire on `x` (one without literals does, while learning), and the sum of their votes.
#[inline(always)]
fn vote(o: &Options, bank: &Bank, x: &[u64], fires: &mut [bool]) -> i64 {
    let words = x.len();
    let lines = bank
        .include
        .chunks_exact(words)
        .zip(bank.live.chunks_exact(words.div_ceil(64)));
    let mut votes = 0;
    for (clause, ((include, live), fires)) in lines.zip(fires).enumerate() {
        *fires = all_true(include, live, x);
        if *fires {
            let weight = if o.weighted {
                i64::from(bank.weights[clause])
            } else {
                1
            };
            votes += if clause % 2 == 0 { weight } else { -weight };
        }
    }
    votes
}

#[inline(always)]
fn all_true(include: &[u64], live: &[u64], x: &[u64]) -> bool {
    for (block, live) in live.iter().enumerate() {
        let mut left = *live;
        while left != 0 {
            let w = 64 * block + left.trailing_zeros() as usize;
            if include[w] & !x[w] != 0 {
                return false;
            }
            left &= left - 1;
        }
    }
    true
}

/// The automata of one clause.
struct Clause<'a, const N: usize> {
    include: &'a mut [u64],
    lower: &'a mut [u64],
    live: &'a mut [u64],
    held: &'a mut u32,
    planes: usize,
    shape: Shape,
}

#[inline(always)]
fn some<const N: usize>(v: &[u64; N]) -> bool {
    v.iter().fold(0, |a, b| a | b) != 0
}

#[inline(always)]
fn load<const N: usize>(from: &[u64]) -> [u64; N] {
    let mut out = [0; N];
    out.copy_from_slice(&from[..N]);
    out
}

impl<'a, const N: usize> Clause<'a, N> {
    #[inline(always)]
    fn of(o: &Options, bank: &'a mut Bank, clause: usize) -> Self {
        let (shape, planes) = (o.shape(), o.state_bits - 1);
        let (words, blocks) = (shape.words, shape.words.div_ceil(64));
        Self {
            include: &mut bank.include[clause * words..(clause + 1) * words],
            lower: &mut bank.lower
                [clause * words * (planes + 1)..(clause + 1) * words * (planes + 1)],
            live: &mut bank.live[clause * blocks..(clause + 1) * blocks],
            held: &mut bank.held[clause],
            planes,
            shape,
        }
    }

    fn held(&self) -> usize {
        *self.held as usize
    }

    /// The mask of automata at state 0 of one group of words.
    #[inline(always)]
    fn zero(&self, group: usize) -> [u64; N] {
        load(&self.lower[(group * (self.planes + 1) + self.planes) * N..])
    }

    #[inline(always)]
    fn valid(&self, group: usize) -> [u64; N] {
        let mut out = [u64::MAX; N];
        if (group + 1) * N * 64 > self.shape.literals {
            for (i, v) in out.iter_mut().enumerate() {
                *v = self.shape.valid(group * N + i);
            }
        }
        out
    }

    /// One step up for the automata in `up`, one down for those in `down` (none of them at state 0), of one group of words.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // Lanes of several arrays at once.
    fn step(&mut self, group: usize, up: [u64; N], down: [u64; N]) {
        let (base, planes) = (group * (self.planes + 1) * N, self.planes);
        let (mut carry, mut borrow, mut moved) = (up, down, [0; N]);
        for p in 0..planes {
            for i in 0..N {
                moved[i] = carry[i] | borrow[i];
            }
            if !some(&moved) {
                break;
            }
            let plane = &mut self.lower[base + p * N..base + (p + 1) * N];
            for i in 0..N {
                let v = plane[i];
                plane[i] = v ^ moved[i];
                carry[i] &= v;
                borrow[i] &= !v;
            }
        }
        for i in 0..N {
            moved[i] = carry[i] | borrow[i];
        }
        if some(&moved) {
            self.top(group, carry, borrow);
        }
        let zero = base + planes * N;
        for i in 0..N {
            self.lower[zero + i] &= !up[i];
        }
        if some(&down) {
            let mut held: [u64; N] = load(&self.include[group * N..]);
            for p in 0..planes {
                for i in 0..N {
                    held[i] |= self.lower[base + p * N + i];
                }
            }
            for i in 0..N {
                self.lower[zero + i] |= down[i] & !held[i];
            }
        }
    }

    /// Carries into the highest bit, and what follows from a literal taken in or put out.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn top(&mut self, group: usize, carry: [u64; N], borrow: [u64; N]) {
        let include = &mut self.include[group * N..(group + 1) * N];
        let (mut full, before) = ([0; N], load::<N>(include));
        for i in 0..N {
            full[i] = include[i] & carry[i];
            // One that is full stays so: its lower bits, which the carry cleared, come back.
            include[i] = (include[i] ^ (carry[i] | borrow[i])) | full[i];
        }
        if some(&full) {
            let base = group * (self.planes + 1) * N;
            for p in 0..self.planes {
                for i in 0..N {
                    self.lower[base + p * N + i] |= full[i];
                }
            }
        }
        for i in 0..N {
            let (w, now) = (group * N + i, include[i]);
            *self.held = *self.held + now.count_ones() - before[i].count_ones();
            let live = &mut self.live[w / 64];
            *live = *live & !(1 << (w % 64)) | u64::from(now != 0) << (w % 64);
        }
    }

    /// Type Ia: true literals towards inclusion, false ones away with probability 1/s.
    #[inline(always)]
    fn recognise(&mut self, x: &[u64], boost: bool, forget: Fraction, random: &mut Random<N>) {
        for group in 0..x.len() / N {
            let (x, zero, valid): ([u64; N], _, _) =
                (load(&x[group * N..]), self.zero(group), self.valid(group));
            let (mut up, mut down) = ([0; N], [0; N]);
            for i in 0..N {
                up[i] = x[i] & valid[i];
                down[i] = !x[i] & !zero[i];
            }
            if some(&down) || (!boost && some(&up)) {
                let mask = forget.mask(random);
                for i in 0..N {
                    down[i] &= mask[i];
                    up[i] &= if boost { u64::MAX } else { !mask[i] };
                }
            }
            self.step(group, up, down);
        }
    }

    /// Type Ib: every literal away with probability 1/s.
    #[inline(always)]
    fn forget(&mut self, forget: Fraction, random: &mut Random<N>) {
        for group in 0..self.include.len() / N {
            let mut down = self.zero(group).map(|z| !z);
            if some(&down) {
                let mask = forget.mask(random);
                (down.iter_mut().zip(mask)).for_each(|(d, m)| *d &= m);
                self.step(group, [0; N], down);
            }
        }
    }

    /// Type II: false literals that are out, towards inclusion.
    #[inline(always)]
    fn reject(&mut self, x: &[u64]) {
        for group in 0..x.len() / N {
            let (x, valid): ([u64; N], _) = (load(&x[group * N..]), self.valid(group));
            let mut up: [u64; N] = load(&self.include[group * N..]);
            for i in 0..N {
                up[i] = !x[i] & !up[i] & valid[i];
            }
            self.step(group, up, [0; N]);
        }
    }
}

/// A clause in words: literals that must be 1, and what it votes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    pub class: usize,
    /// Positive for the class, negative against it.
    pub weight: i64,
    /// Literals in increasing order; those from the number of features on are negations.
    pub literals: Vec<u32>,
}

/// A machine that learns.
#[derive(Debug, Clone, PartialEq)]
pub struct Machine {
    options: Options,
    banks: Vec<Bank>,
    epochs: u64,
}

impl Machine {
    /// # Errors
    /// As [`Options::check`].
    pub fn new(options: Options) -> Result<Self> {
        options.check()?;
        let banks = vec![Bank::new(&options); options.classes];
        Ok(Self {
            options,
            banks,
            epochs: 0,
        })
    }

    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Epochs learned so far.
    pub fn epochs(&self) -> u64 {
        self.epochs
    }

    fn check(&self, x: &Literals) -> Result<()> {
        if (x.features, x.negations) != (self.options.features, self.options.negations) {
            let expected = format!("rows of {} bits", self.options.features);
            return Err(Error::shape("x", expected, x.features));
        }
        Ok(())
    }

    /// Learns `y` (class numbers) from `x` for some more epochs; after an interruption the machine is as before.
    ///
    /// # Errors
    /// `Shape`, `Value`: arguments that do not fit; `Interrupted`.
    pub fn learn(&mut self, x: &Literals, y: &[u32], epochs: usize, cancel: &Cancel) -> Result<()> {
        self.check(x)?;
        let classes = self.options.classes;
        if y.len() != x.rows() {
            let expected = format!("{} labels, one per row", x.rows());
            return Err(Error::shape("y", expected, y.len()));
        }
        if let Some(bad) = y.iter().find(|c| **c as usize >= classes) {
            return Err(Error::value("y", format!("below {classes}"), bad));
        }
        if x.rows() > u32::MAX as usize {
            return Err(Error::shape("x", "fewer than 2^32 rows", x.rows()));
        }
        let mut banks = self.banks.clone();
        for epoch in self.epochs..self.epochs + epochs as u64 {
            let lessons = self.lessons(y, epoch);
            let items = banks.iter_mut().zip(&lessons).enumerate().collect();
            par::try_map(usize::MAX, items, |(class, (bank, lessons))| {
                let key = key(&[self.options.seed, 1, epoch, class as u64]);
                self.class(bank, x, lessons, key, cancel)
            })?;
            cancel.advance(1);
        }
        self.banks = banks;
        self.epochs += epochs as u64;
        Ok(())
    }

    /// What each class learns in one epoch, in order.
    fn lessons(&self, y: &[u32], epoch: u64) -> Vec<Vec<Lesson>> {
        let (classes, seed) = (self.options.classes, self.options.seed);
        let below = |bits: u64, n: usize| ((u128::from(bits) * n as u128) >> 64) as usize;
        let mut order: Vec<u32> = (0..y.len() as u32).collect();
        if self.options.shuffle {
            let start = key(&[seed, 2, epoch]);
            for i in (1..order.len()).rev() {
                let j = below(
                    mix(start.wrapping_add(GOLDEN.wrapping_mul(i as u64))),
                    i + 1,
                );
                order.swap(i, j);
            }
        }
        let start = key(&[seed, 3, epoch]);
        let mut lessons = vec![Vec::new(); classes];
        for (place, row) in order.iter().enumerate() {
            let own = y[*row as usize] as usize;
            let draw = mix(start.wrapping_add(GOLDEN.wrapping_mul(place as u64 + 1)));
            let other = below(draw, classes - 1);
            let other = other + usize::from(other >= own);
            lessons[own].push((*row, place as u32, true));
            lessons[other].push((*row, place as u32, false));
        }
        lessons
    }

    fn class(
        &self,
        bank: &mut Bank,
        x: &Literals,
        lessons: &[Lesson],
        key: u64,
        cancel: &Cancel,
    ) -> Result<()> {
        let options = &self.options;
        let forget = Fraction::of(1.0 / options.s);
        match options.shape().lanes {
            2 => dispatch(Learn::<2> {
                options,
                forget,
                bank,
                x,
                lessons,
                key,
                cancel,
            }),
            4 => dispatch(Learn::<4> {
                options,
                forget,
                bank,
                x,
                lessons,
                key,
                cancel,
            }),
            _ => dispatch(Learn::<8> {
                options,
                forget,
                bank,
                x,
                lessons,
                key,
                cancel,
            }),
        }
    }

    /// Clauses with literals, equal ones of a class added up, those that cancel out left out.
    pub fn rules(&self) -> Vec<Rule> {
        let (o, words) = (&self.options, self.options.shape().words);
        let mut rules = Vec::new();
        for (class, bank) in self.banks.iter().enumerate() {
            let mut found: Vec<(&[u64], i64)> = (bank.include.chunks_exact(words).enumerate())
                .filter(|(clause, _)| bank.held[*clause] > 0)
                .map(|(clause, include)| {
                    let weight = if o.weighted {
                        i64::from(bank.weights[clause])
                    } else {
                        1
                    };
                    (include, if clause % 2 == 0 { weight } else { -weight })
                })
                .collect();
            found.sort();
            for same in found.chunk_by(|a, b| a.0 == b.0) {
                let weight = same.iter().map(|s| s.1).sum();
                if weight != 0 {
                    let bits = |w: usize| {
                        (0..64)
                            .filter(move |b| same[0].0[w] >> b & 1 == 1)
                            .map(move |b| (64 * w + b) as u32)
                    };
                    let literals = (0..words).flat_map(bits).collect();
                    rules.push(Rule {
                        class,
                        weight,
                        literals,
                    });
                }
            }
        }
        rules
    }

    /// Votes for each class, row after row; with `clip` within ±T.
    ///
    /// # Errors
    /// `Shape`: rows of another width.
    pub fn votes(&self, x: &Literals, clip: bool) -> Result<Vec<i64>> {
        self.check(x)?;
        let (rules, classes) = (self.rules(), self.options.classes);
        let mut starts = vec![0; classes + 1];
        rules.iter().for_each(|r| starts[r.class + 1] += 1);
        (0..classes).for_each(|c| starts[c + 1] += starts[c]);
        let most = i64::from(self.options.threshold);
        let bytes = x.rows() * rules.len();
        let parts = par::map(bytes, par::ranges(x.rows(), BATCH), |range| {
            let mut out = dispatch(Count {
                x,
                rules: &rules,
                classes,
                range,
            });
            if clip {
                out.iter_mut().for_each(|v| *v = (*v).clamp(-most, most));
            }
            out
        });
        Ok(parts.concat())
    }

    /// The states of all automata, `classes × clauses × literals`, and the weights, `classes × clauses`.
    pub fn states(&self) -> (Vec<u8>, Vec<u32>) {
        let o = &self.options;
        let parts = par::map(
            o.clauses * o.literals(),
            self.banks.iter().collect(),
            |bank: &Bank| {
                let all = (0..o.clauses).flat_map(|c| (0..o.literals()).map(move |l| (c, l)));
                all.map(|(c, l)| bank.state(o, c, l)).collect::<Vec<u8>>()
            },
        );
        let weights = self.banks.iter().flat_map(|b| b.weights.iter().copied());
        (parts.concat(), weights.collect())
    }

    /// A machine in the states that [`Machine::states`] gave.
    ///
    /// # Errors
    /// As [`Machine::new`]; `Shape`, `Value`: states or weights that do not fit.
    pub fn restore(options: Options, states: &[u8], weights: &[u32], epochs: u64) -> Result<Self> {
        let mut machine = Self::new(options)?;
        let (o, literals) = (machine.options.clone(), machine.options.literals());
        let (clauses, most) = (o.classes * o.clauses, (1u32 << o.state_bits) - 1);
        if states.len() != clauses * literals || weights.len() != clauses {
            let expected = format!("{} states and {clauses} weights", clauses * literals);
            let found = format!("{} and {}", states.len(), weights.len());
            return Err(Error::shape("states", expected, found));
        }
        if let Some(bad) = states.iter().find(|s| u32::from(**s) > most) {
            return Err(Error::value("states", format!("0 to {most}"), bad));
        }
        if weights.contains(&0) {
            return Err(Error::value("weights", "1 or more", 0));
        }
        let lines = states
            .chunks_exact(o.clauses * literals)
            .zip(weights.chunks_exact(o.clauses));
        let items = machine.banks.iter_mut().zip(lines).collect();
        par::for_each(
            states.len(),
            items,
            |(bank, (states, weights)): (&mut Bank, (&[u8], &[u32]))| {
                for clause in 0..o.clauses {
                    bank.set(&o, clause, |l| states[clause * literals + l]);
                }
                bank.weights.copy_from_slice(weights);
            },
        );
        machine.epochs = epochs;
        Ok(machine)
    }
}

/// Votes of some rows, by literals of all of them at once.
struct Count<'a> {
    x: &'a Literals,
    rules: &'a [Rule],
    classes: usize,
    range: std::ops::Range<usize>,
}

impl Kernel for Count<'_> {
    type Output = Vec<i64>;
    #[inline(always)]
    fn run(self) -> Vec<i64> {
        let count = self.range.len();
        let literals = self.x.shape.literals;
        let mut columns = vec![[0u64; BATCH_WORDS]; literals];
        for (i, row) in self.range.enumerate() {
            for (w, word) in self.x.row(row).iter().enumerate() {
                let mut left = *word;
                while left != 0 {
                    let literal = 64 * w + left.trailing_zeros() as usize;
                    columns[literal][i / 64] |= 1 << (i % 64);
                    left &= left - 1;
                }
            }
        }
        let mut out = vec![0; count * self.classes];
        for rule in self.rules {
            let mut fires = [u64::MAX; BATCH_WORDS];
            for literal in &rule.literals {
                let column = &columns[*literal as usize];
                let mut left = 0;
                for (f, c) in fires.iter_mut().zip(column) {
                    *f &= c;
                    left |= *f;
                }
                if left == 0 {
                    break;
                }
            }
            for (w, word) in fires.into_iter().enumerate() {
                let mut left = word;
                while left != 0 {
                    let i = 64 * w + left.trailing_zeros() as usize;
                    out[i * self.classes + rule.class] += rule.weight;
                    left &= left - 1;
                }
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn options(classes: usize, features: usize, clauses: usize) -> Options {
        Options {
            classes,
            features,
            clauses,
            threshold: 15,
            s: 3.9,
            boost: false,
            negations: true,
            weighted: false,
            max_literals: usize::MAX,
            state_bits: 8,
            shuffle: true,
            seed: 7,
        }
    }

    fn literals(rows: &[Vec<bool>], negations: bool) -> Literals {
        Literals::new(rows.len(), rows[0].len(), negations, |i, mark| {
            (0..rows[i].len()).filter(|j| rows[i][*j]).for_each(mark);
        })
    }

    #[test]
    fn the_chances_of_the_reference() {
        let part = |own, votes| chance(own, votes, 15) as f64 / 2f64.powi(32);
        assert!((part(true, 5) - 1.0 / 3.0).abs() < 1e-9);
        assert!((part(false, 5) - 2.0 / 3.0).abs() < 1e-9);
        assert_eq!((part(true, 15), part(false, 15)), (0.0, 1.0));
        assert_eq!(chance(false, 15, 15), 1 << 32);
    }

    #[test]
    fn the_steps_of_the_reference() {
        let o = Options {
            state_bits: 3,
            negations: false,
            ..options(2, 4, 2)
        };
        let mut bank = Bank::new(&o);
        let states = |bank: &Bank| [0, 1, 2, 3].map(|l| bank.state(&o, 1, l));
        assert_eq!(states(&bank), [3; 4]);
        bank.set(&o, 1, |l| [3, 7, 0, 4][l]);
        let start = bank.clone();
        assert_eq!((states(&bank), bank.held[1]), ([3, 7, 0, 4], 2));
        Clause::<2>::of(&o, &mut bank, 1).step(0, [15, 0], [0; 2]);
        assert_eq!((states(&bank), bank.held[1]), ([4, 7, 1, 5], 3));
        let mut bank = start;
        let mut clause = Clause::<2>::of(&o, &mut bank, 1);
        let down = clause.zero(0).map(|z| !z & 15);
        clause.step(0, [0; 2], down);
        assert_eq!((states(&bank), bank.held[1]), ([2, 6, 0, 3], 1));
        assert_eq!(states(&bank).map(|_| 0), [0; 4]);
    }

    #[test]
    fn clauses_fire_as_they_should() {
        let o = options(2, 2, 2);
        let mut machine = Machine::new(o.clone()).unwrap();
        // x0 and not x1.
        machine.banks[0].set(&o, 0, |l| if l == 0 || l == 3 { 200 } else { 3 });
        let x = literals(
            &[vec![true, false], vec![true, true], vec![false, false]],
            true,
        );
        let mut fires = [false; 2];
        let fired: Vec<[bool; 2]> = (0..3)
            .map(|i| {
                vote(&o, &machine.banks[0], x.row(i), &mut fires);
                fires
            })
            .collect();
        // The other clause has no literals: it fires while learning, and has no vote after.
        assert_eq!(fired, [[true, true], [false, true], [false, true]]);
        assert_eq!(machine.votes(&x, false).unwrap(), [1, 0, 0, 0, 0, 0]);
        assert_eq!(
            machine.rules(),
            [Rule {
                class: 0,
                weight: 1,
                literals: vec![0, 3]
            }]
        );
    }

    #[test]
    fn fractions_and_their_masks() {
        for s in [1.0, 1.5, 2.0, 3.9, 10.0, 27.0, 100.0, 3000.0] {
            let f = Fraction::of(1.0 / s);
            assert!((f.value() * s - 1.0).abs() <= 0.005, "{s} {f:?}");
            let mut random = Random::<8>::new(3);
            let rounds = 4000;
            let ones: u32 = (0..rounds)
                .map(|_| {
                    f.mask(&mut random)
                        .iter()
                        .map(|w| w.count_ones())
                        .sum::<u32>()
                })
                .sum();
            let (n, p) = (f64::from(rounds) * 512.0, f.value());
            let z = (f64::from(ones) - n * p) / (n * p * (1.0 - p)).sqrt().max(1.0);
            assert!(z.abs() < 4.5, "{s}: {z}");
        }
        assert_eq!(Fraction::of(1e-9).mask(&mut Random::<2>::new(0)), [0; 2]);
    }

    #[test]
    fn the_generator_is_the_published_one() {
        let mut r = Random::<2>([[1; 2], [2; 2], [3; 2], [4; 2]]);
        assert_eq!((r.next()[0], r.next()[1]), (41_943_041, 58_720_359));
    }

    /// Noisy XOR: two of twelve bits decide, four labels in ten are wrong while learning.
    fn noisy_xor(n: usize, noise: u64, seed: u64) -> (Vec<Vec<bool>>, Vec<u32>) {
        let bits = |i: usize| key(&[seed, i as u64]);
        let x: Vec<Vec<bool>> = (0..n)
            .map(|i| (0..12).map(|j| bits(i) >> j & 1 == 1).collect())
            .collect();
        let y = (0..n)
            .map(|i| u32::from(x[i][0] ^ x[i][1] ^ (bits(i) >> 20 & 1023 < noise)))
            .collect();
        (x, y)
    }

    #[test]
    fn noisy_xor_is_learned() {
        let ((x, y), (held, truth)) = (noisy_xor(4000, 410, 1), noisy_xor(2000, 0, 2));
        // Weighted votes grow past T = 15 at once, so that a larger T is needed; pyTsetlinMachine reaches .84 to .97 there.
        for (weighted, threshold, threads, least) in [
            (false, 15, 1, 1980),
            (false, 15, 3, 1980),
            (true, 1000, 2, 1600),
        ] {
            let before = par::num_threads();
            par::set_num_threads(threads);
            let o = Options {
                weighted,
                threshold,
                ..options(2, 12, 10)
            };
            let mut machine = Machine::new(o).unwrap();
            machine
                .learn(&literals(&x, true), &y, 30, &Cancel::new())
                .unwrap();
            par::set_num_threads(before);
            let votes = machine.votes(&literals(&held, true), false).unwrap();
            let right = (votes.chunks_exact(2).zip(&truth))
                .filter(|(v, y)| u32::from(v[1] > v[0]) == **y)
                .count();
            assert!(right >= least, "{right} of 2000");
        }
    }

    #[test]
    fn threads_and_pauses_change_nothing() {
        let (x, y) = noisy_xor(300, 300, 5);
        let (x, y): (_, Vec<u32>) = (
            literals(&x, true),
            y.iter()
                .enumerate()
                .map(|(i, v)| (v + i as u32) % 3)
                .collect(),
        );
        let before = par::num_threads();
        let mut seen = Vec::new();
        for (threads, epochs) in [(1, vec![3]), (4, vec![1, 2])] {
            par::set_num_threads(threads);
            let mut machine = Machine::new(Options {
                weighted: true,
                ..options(3, 12, 10)
            })
            .unwrap();
            for e in epochs {
                machine.learn(&x, &y, e, &Cancel::new()).unwrap();
            }
            seen.push(machine);
        }
        par::set_num_threads(before);
        assert_eq!(seen[0], seen[1]);
        let (states, weights) = seen[0].states();
        let again = Machine::restore(seen[0].options().clone(), &states, &weights, 3).unwrap();
        assert_eq!(again, seen[0]);
        assert_eq!(again.epochs(), 3);
        let mut stopped = again.clone();
        let cancel = Cancel::new();
        cancel.cancel();
        assert_eq!(stopped.learn(&x, &y, 1, &cancel), Err(Error::Interrupted));
        assert_eq!(stopped, again);
    }

    /// The same machine with a number for each automaton, and the same random numbers.
    fn plainly(
        o: &Options,
        rows: &[Vec<bool>],
        lessons: &[Lesson],
        start: u64,
    ) -> (Vec<Vec<u8>>, Vec<u32>) {
        const N: usize = 8;
        let literals = o.literals();
        let (middle, most) = (
            (1u32 << (o.state_bits - 1)) as u8,
            ((1u32 << o.state_bits) - 1) as u8,
        );
        let mut states = vec![vec![middle - 1; literals]; o.clauses];
        let mut weights = vec![1u32; o.clauses];
        let groups = literals.div_ceil(64 * N);
        for (row, place, own) in lessons.iter().copied() {
            let x: Vec<bool> = (0..literals)
                .map(|l| {
                    if l < o.features {
                        rows[row as usize][l]
                    } else {
                        !rows[row as usize][l - o.features]
                    }
                })
                .collect();
            let fires: Vec<bool> = states
                .iter()
                .map(|c| c.iter().zip(&x).all(|(s, x)| *s < middle || *x))
                .collect();
            let votes: i64 = (0..o.clauses)
                .filter(|c| fires[*c])
                .map(|c| {
                    i64::from(if o.weighted { weights[c] } else { 1 })
                        * if c % 2 == 0 { 1 } else { -1 }
                })
                .sum();
            let t = i64::from(o.threshold);
            let chance = chance(own, votes.clamp(-t, t), t);
            if chance == 0 {
                continue;
            }
            let mut random = Random::<N>::new(key(&[start, u64::from(place)]));
            for first in (0..o.clauses).step_by(2 * N) {
                let draws = random.next();
                for clause in first..(first + 2 * N).min(o.clauses) {
                    let draw =
                        draws[(clause - first) / 2] >> (32 * ((clause - first) % 2)) & 0xffff_ffff;
                    if draw >= chance {
                        continue;
                    }
                    let held = states[clause].iter().filter(|s| **s >= middle).count();
                    let same = (clause % 2 == 0) == own;
                    if same && o.weighted && fires[clause] && held <= o.max_literals {
                        weights[clause] += 1;
                    } else if !same && o.weighted && fires[clause] {
                        weights[clause] = (weights[clause] - 1).max(1);
                    }
                    for group in 0..groups {
                        let range = group * 64 * N..((group + 1) * 64 * N).min(literals);
                        let line = &mut states[clause][range.clone()];
                        let x = &x[range];
                        if !same {
                            if fires[clause] {
                                (line.iter_mut().zip(x))
                                    .filter(|(s, x)| **s < middle && !**x)
                                    .for_each(|(s, _)| *s += 1);
                            }
                            continue;
                        }
                        let good = fires[clause] && held <= o.max_literals;
                        let moves = (line.iter().zip(x))
                            .any(|(s, x)| if good && *x { !o.boost } else { *s > 0 });
                        if !moves && !good {
                            continue;
                        }
                        let mask = if moves {
                            Fraction::of(1.0 / o.s).mask(&mut random)
                        } else {
                            [0; N]
                        };
                        for (l, (s, x)) in line.iter_mut().zip(x).enumerate() {
                            let drawn = mask[l / 64] >> (l % 64) & 1 == 1;
                            if good && *x {
                                *s = if (o.boost || !drawn) && *s < most {
                                    *s + 1
                                } else {
                                    *s
                                };
                            } else if drawn {
                                *s = s.saturating_sub(1);
                            }
                        }
                    }
                }
            }
        }
        (states, weights)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn bit_planes_do_what_numbers_do(
            features in 130usize..700,
            boost: bool,
            weighted: bool,
            negations: bool,
            state_bits in 2usize..9,
            max_literals in 3usize..200,
            seed in any::<u64>(),
        ) {
            let features = if negations { features } else { 2 * features };
            let o = Options {
                boost, weighted, negations, state_bits, max_literals, seed, s: 2.7, threshold: 4,
                ..options(2, features, 20)
            };
            let rows: Vec<Vec<bool>> = (0..40)
                .map(|i| (0..features).map(|j| mix(key(&[seed, i, j as u64])).is_multiple_of(3)).collect())
                .collect();
            let y: Vec<u32> = (0..40).map(|i| u32::from(rows[i][3])).collect();
            let mut machine = Machine::new(o.clone()).unwrap();
            let lessons = machine.lessons(&y, 0);
            let expected: Vec<_> = (0..2u64)
                .map(|c| plainly(&o, &rows, &lessons[c as usize], key(&[seed, 1, 0, c])))
                .collect();
            for level in crate::simd::available() {
                // Forced for this machine alone: other tests agree on every level anyway.
                crate::simd::set_level(level);
                machine = Machine::new(o.clone()).unwrap();
                machine.learn(&literals(&rows, negations), &y, 1, &Cancel::new()).unwrap();
                let (states, weights) = machine.states();
                prop_assert_eq!(&states, &expected.iter().flat_map(|e| e.0.concat()).collect::<Vec<_>>());
                prop_assert_eq!(&weights, &expected.iter().flat_map(|e| e.1.clone()).collect::<Vec<_>>());
            }
            let votes = machine.votes(&literals(&rows, negations), true).unwrap();
            let middle = 1u8 << (state_bits - 1);
            for (i, row) in rows.iter().enumerate() {
                for c in 0..2 {
                    let v: i64 = (0..20)
                        .filter(|j| {
                            let line = &expected[c].0[*j];
                            let on = |l: usize| if l < features { row[l] } else { !row[l - features] };
                            line.iter().any(|s| *s >= middle) && (0..line.len()).all(|l| line[l] < middle || on(l))
                        })
                        .map(|j| i64::from(if weighted { expected[c].1[j] } else { 1 }) * if j % 2 == 0 { 1 } else { -1 })
                        .sum();
                    prop_assert_eq!(votes[2 * i + c], v.clamp(-4, 4));
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let good = options(2, 3, 4);
        for (bad, expected) in [
            (
                Options {
                    classes: 1,
                    ..good.clone()
                },
                "two classes",
            ),
            (
                Options {
                    features: 0,
                    ..good.clone()
                },
                "one bit",
            ),
            (
                Options {
                    clauses: 3,
                    ..good.clone()
                },
                "even",
            ),
            (
                Options {
                    threshold: 0,
                    ..good.clone()
                },
                "threshold",
            ),
            (
                Options {
                    s: 0.9,
                    ..good.clone()
                },
                "s:",
            ),
            (
                Options {
                    state_bits: 9,
                    ..good.clone()
                },
                "state_bits",
            ),
            (
                Options {
                    max_literals: 0,
                    ..good.clone()
                },
                "max_literals",
            ),
        ] {
            let err = Machine::new(bad).unwrap_err().to_string();
            assert!(err.contains(expected), "{err}");
        }
        let mut machine = Machine::new(good.clone()).unwrap();
        let x = literals(&[vec![true; 3], vec![false; 3]], true);
        assert!(machine.learn(&x, &[0], 1, &Cancel::new()).is_err());
        assert!(machine.learn(&x, &[0, 2], 1, &Cancel::new()).is_err());
        let wide = literals(&[vec![true; 4]], true);
        assert!(machine.learn(&wide, &[0], 1, &Cancel::new()).is_err());
        assert!(machine.votes(&wide, true).is_err());
        let (states, mut weights) = machine.states();
        assert!(Machine::restore(good.clone(), &states[1..], &weights, 0).is_err());
        weights[0] = 0;
        assert!(Machine::restore(good, &states, &weights, 0).is_err());
    }
}
