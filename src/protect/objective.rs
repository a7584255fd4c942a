//! From class log-sums to posterior, readings and the derivative of the objective.

use super::tile::Scalar;
use crate::simd::Kernel;

/// Function of a row's posterior whose mean is evaluated and differentiated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Objective {
    /// `1 - max P`; its gradient is a subgradient (lowest class index on ties).
    Plugin,
    /// `1 - Σ P²`.
    Gini,
    /// `1 - Σ s P`, s the softmax of the log joint over τ: τ = 1 is gini, τ → 0 plugin.
    SoftmaxTau(f64),
    /// `-Σ P log P`.
    Entropy,
    /// `1 - P_y`.
    Soft,
    /// `min(1 - P_y, 1 - 1/C)`: a row stops counting once its own label is no likelier than chance.
    SoftCapped,
    /// `-log P_y`.
    Nll,
}

/// How a query that is also a centre is kept from vouching for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaveOneOut {
    /// Every centre counts.
    None,
    /// The own kernel is dropped, class counts stay.
    Plain,
    /// The own kernel is dropped and the own class counts one member less.
    Corrected,
}

/// What happens to a query whose class has no centre but its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Singleton {
    /// It counts, with probability 0 for its own class.
    Keep,
    /// It is left out of the mean and remains a centre.
    Exclude,
}

/// What is computed of the distances.
#[derive(Debug, Clone)]
pub struct Spec {
    pub classes: usize,
    /// The objective is the mean over these.
    pub bandwidths: Vec<f64>,
    pub objective: Objective,
    pub leave_one_out: LeaveOneOut,
    pub singleton: Singleton,
    /// Class priors; the shares of the centres where `None`.
    pub priors: Option<Vec<f64>>,
}

/// Readings of one query, means over the bandwidths.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RowReading {
    pub value: f64,
    pub plugin: f64,
    pub gini: f64,
    pub soft: f64,
    pub entropy: f64,
    pub nll: f64,
    /// Share of bandwidths at which the likeliest class (lowest index on ties) is not the row's label.
    pub wrong: f64,
    /// 1 where the row counts in the mean.
    pub counted: f64,
}

impl RowReading {
    /// Adds all readings but `counted`.
    pub(super) fn add(&mut self, r: &Self, scale: f64) {
        self.value += scale * r.value;
        self.plugin += scale * r.plugin;
        self.gini += scale * r.gini;
        self.soft += scale * r.soft;
        self.entropy += scale * r.entropy;
        self.nll += scale * r.nll;
        self.wrong += scale * r.wrong;
    }

    /// Means over the rows that count, in order; `counted` becomes their number.
    pub fn mean(rows: &[Self]) -> Self {
        let n: f64 = rows.iter().map(|r| r.counted).sum();
        let mut total = Self {
            counted: n,
            ..Self::default()
        };
        for r in rows.iter().filter(|r| r.counted > 0.0) {
            total.add(r, 1.0 / n);
        }
        total
    }
}

/// A query as the posterior sees it.
#[derive(Debug, Clone, Copy)]
pub struct Query {
    pub label: usize,
    /// Class of the centre that is left out for this query, if there is one.
    pub own_class: Option<usize>,
}

/// `1 / 2h²` as the kernels round it.
pub fn inverse_width<R: Scalar>(h: f64) -> R {
    R::from_f64(0.5 / (h * h))
}

/// Everything about the spec and the centres that is the same for all queries.
#[derive(Debug)]
pub struct Posterior<'a> {
    pub spec: &'a Spec,
    /// Centres per class.
    pub counts: Vec<f64>,
    log_priors: Vec<f64>,
}

/// What a query sees of the centres.
#[derive(Debug, Clone, Copy)]
pub struct ClassSums<'a, R> {
    /// Least squared distance to each class, ∞ where none of its centres counts.
    pub least: &'a [R],
    /// `Σ exp((least - d²) / 2h²)` per bandwidth and class.
    pub sums: &'a [f64],
}

/// Work space of [`Posterior::row`].
#[derive(Debug)]
pub struct Scratch {
    log_joint: Vec<f64>,
    p: Vec<f64>,
    q: Vec<f64>,
}

impl Scratch {
    pub fn new(classes: usize) -> Self {
        Self {
            log_joint: vec![0.0; classes],
            p: vec![0.0; classes],
            q: vec![0.0; classes],
        }
    }
}

impl<'a> Posterior<'a> {
    pub fn new(spec: &'a Spec, counts: &[usize]) -> Self {
        let counts: Vec<f64> = counts.iter().map(|c| *c as f64).collect();
        let total: f64 = counts.iter().sum();
        let log_priors = match &spec.priors {
            Some(p) => p.iter().map(|p| p.ln()).collect(),
            None => counts.iter().map(|c| (c / total).ln()).collect(),
        };
        Self {
            spec,
            counts,
            log_priors,
        }
    }

    fn own_class(&self, query: Query) -> Option<usize> {
        query
            .own_class
            .filter(|_| self.spec.leave_one_out != LeaveOneOut::None)
    }

    /// Whether the query counts in the mean.
    pub fn counts_query(&self, query: Query) -> bool {
        let own = self.own_class(query) == Some(query.label);
        let left = self.counts[query.label] - f64::from(u8::from(own));
        self.spec.singleton == Singleton::Keep || left > 0.0
    }

    /// Log of each class's share of the density at a query, up to what all classes have in common.
    fn log_joint<R: Scalar>(
        &self,
        own: Option<usize>,
        least: &[R],
        sums: &[f64],
        k: f64,
        out: &mut [f64],
    ) {
        for c in 0..self.spec.classes {
            let corrected = self.spec.leave_one_out == LeaveOneOut::Corrected && own == Some(c);
            let members = self.counts[c] - f64::from(u8::from(corrected));
            out[c] = if sums[c] > 0.0 && members > 0.0 {
                sums[c].ln() - least[c].to_f64() * k + self.log_priors[c] - members.ln()
            } else {
                f64::NEG_INFINITY
            };
        }
    }

    /// How far the objective of one query can be from its value at `found` if every class sum lies between `low` and `high`.
    pub fn error<R: Scalar>(
        &self,
        query: Query,
        found: ClassSums<'_, R>,
        low: ClassSums<'_, R>,
        high: ClassSums<'_, R>,
        scratch: &mut Scratch,
    ) -> f64 {
        let classes = self.spec.classes;
        let own = self.own_class(query);
        let mut total = 0.0;
        for (b, h) in self.spec.bandwidths.iter().enumerate() {
            let k = inverse_width::<R>(*h).to_f64();
            let part = b * classes..(b + 1) * classes;
            let log = |of: ClassSums<'_, R>, out: &mut [f64]| {
                self.log_joint(own, of.least, &of.sums[part.clone()], k, out);
            };
            log(found, &mut scratch.log_joint);
            log(low, &mut scratch.p);
            log(high, &mut scratch.q);
            let share = |own: f64, c: usize, others: &[f64]| {
                if own == f64::NEG_INFINITY {
                    return 0.0;
                }
                let others = (others.iter().enumerate()).filter(|(o, _)| *o != c);
                1.0 / (1.0 + others.map(|(_, l)| (l - own).exp()).sum::<f64>())
            };
            let spread = |c: usize| {
                let p = share(scratch.log_joint[c], c, &scratch.log_joint);
                (
                    p,
                    share(scratch.p[c], c, &scratch.q),
                    share(scratch.q[c], c, &scratch.p),
                )
            };
            let each = (0..classes).map(spread);
            total += match self.spec.objective {
                Objective::Soft | Objective::SoftCapped => {
                    let (p, low, high) = spread(query.label);
                    (high - p).max(p - low)
                }
                Objective::Nll => {
                    let (p, low, high) = spread(query.label);
                    (high / p).ln().max((p / low).ln())
                }
                Objective::Plugin => {
                    let far = each.map(|(p, low, high)| (high - p).max(p - low));
                    far.fold(0.0, f64::max)
                }
                Objective::Gini | Objective::SoftmaxTau(_) | Objective::Entropy => each
                    .map(|(p, low, high)| (high * high - p * p).max(p * p - low * low))
                    .sum(),
            };
        }
        total / self.spec.bandwidths.len() as f64
    }

    /// One query: from its class sums to the readings, the posterior (mean over bandwidths, added to `posterior`) and, per
    /// bandwidth and class, the factor of those exponentials in the gradient: `∂φ/∂L · 2 (1/2h²) / (Σ exp · H · rows)`.
    pub fn row<R: Scalar>(
        &self,
        query: Query,
        found: ClassSums<'_, R>,
        rows: f64,
        factors: &mut [f64],
        mut posterior: Option<&mut [f64]>,
        scratch: &mut Scratch,
    ) -> RowReading {
        let ClassSums { least, sums } = found;
        let spec = self.spec;
        let share = 1.0 / spec.bandwidths.len() as f64;
        let own = self.own_class(query);
        let mut total = RowReading {
            counted: f64::from(u8::from(self.counts_query(query))),
            ..RowReading::default()
        };
        for (b, h) in spec.bandwidths.iter().enumerate() {
            let k = inverse_width::<R>(*h).to_f64();
            let sums = &sums[b * spec.classes..][..spec.classes];
            self.log_joint(own, least, sums, k, &mut scratch.log_joint);
            let reading = read(spec.objective, query.label, scratch);
            total.add(&reading, share);
            if let Some(p) = posterior.as_deref_mut() {
                for (to, p) in p.iter_mut().zip(&scratch.p) {
                    *to += p * share;
                }
            }
            let scale = total.counted * 2.0 * k * share / rows;
            for c in 0..spec.classes {
                let q = scratch.q[c];
                let factor = if q == 0.0 { 0.0 } else { scale * q / sums[c] };
                let vanishes = factor.abs() < R::FACTOR_FLOOR;
                factors[b * spec.classes + c] = if vanishes { 0.0 } else { factor };
            }
        }
        total
    }
}

/// Softmax of `log_joint` into `p`, `∂φ/∂L` into `q`, and all readings.
fn read(objective: Objective, label: usize, scratch: &mut Scratch) -> RowReading {
    let Scratch { log_joint, p, q } = scratch;
    let top = log_joint.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut total = 0.0;
    for (p, l) in p.iter_mut().zip(log_joint.iter()) {
        *p = (l - top).exp();
        total += *p;
    }
    p.iter_mut().for_each(|p| *p /= total);
    let log_total = top + total.ln();
    let likeliest = (0..p.len()).fold(0, |best, c| if p[c] > p[best] { c } else { best });
    let squares: f64 = p.iter().map(|p| p * p).sum();
    let entropy: f64 = -p.iter().map(|p| plogp(*p)).sum::<f64>();
    let mut reading = RowReading {
        value: 0.0,
        plugin: 1.0 - p[likeliest],
        gini: 1.0 - squares,
        soft: 1.0 - p[label],
        entropy,
        nll: log_total - log_joint[label],
        wrong: f64::from(u8::from(likeliest != label)),
        counted: 1.0,
    };
    let chance = 1.0 - 1.0 / p.len() as f64;
    reading.value = match objective {
        Objective::Plugin => {
            towards(likeliest, p, q);
            reading.plugin
        }
        Objective::Gini => {
            each(p, q, |p| -2.0 * p * (p - squares));
            reading.gini
        }
        Objective::SoftmaxTau(tau) => softmax_tau(tau, top, log_joint, p, q),
        Objective::Entropy => {
            each(p, q, |p| -plogp(p) - p * entropy);
            entropy
        }
        Objective::Soft => {
            towards(label, p, q);
            reading.soft
        }
        Objective::SoftCapped if reading.soft >= chance => {
            q.fill(0.0);
            chance
        }
        Objective::SoftCapped => {
            towards(label, p, q);
            reading.soft
        }
        Objective::Nll => {
            q.copy_from_slice(p);
            q[label] -= 1.0;
            reading.nll
        }
    };
    reading
}

fn plogp(p: f64) -> f64 {
    if p > 0.0 { p * p.ln() } else { 0.0 }
}

fn each(p: &[f64], q: &mut [f64], f: impl Fn(f64) -> f64) {
    for (q, p) in q.iter_mut().zip(p) {
        *q = f(*p);
    }
}

/// Derivative of `1 - P_m`.
fn towards(m: usize, p: &[f64], q: &mut [f64]) {
    let own = p[m];
    each(p, q, |p| own * p);
    // Written as a product of the others' share, which keeps its digits where P_m is close to 1.
    let others: f64 = (p.iter().enumerate())
        .filter(|(c, _)| *c != m)
        .map(|(_, p)| p)
        .sum();
    q[m] = -own * others;
}

fn softmax_tau(tau: f64, top: f64, log_joint: &[f64], p: &[f64], q: &mut [f64]) -> f64 {
    let mut total = 0.0;
    for (s, l) in q.iter_mut().zip(log_joint) {
        *s = ((l - top) / tau).exp();
        total += *s;
    }
    q.iter_mut().for_each(|s| *s /= total);
    let m: f64 = q.iter().zip(p).map(|(s, p)| s * p).sum();
    for (q, p) in q.iter_mut().zip(p) {
        let s = *q;
        *q = -(p * (s - m) + s * (p - m) / tau);
    }
    1.0 - m
}

/// Least distance and sum of exponentials of one run of squared distances: what [`Posterior::row`] is fed with.
pub struct Exponentials<'a, R> {
    pub squared: &'a [R],
    pub width: R,
    /// `exp((least - d²) width)`, 0 where nothing counts.
    pub out: &'a mut [R],
}

impl<R: Scalar> Kernel for Exponentials<'_, R> {
    type Output = (R, f64);
    #[inline(always)]
    fn run(self) -> (R, f64) {
        let least = super::tile::least(self.squared);
        if least == R::INFINITY {
            self.out.fill(R::ZERO);
            return (least, 0.0);
        }
        (
            least,
            super::tile::exponentials(self.squared, least, self.width, self.out),
        )
    }
}
