//! Noise that a class can be told by, in one pass over memory: patterns shared by a class, linearly separable patches,
//! autoregressive processes, convolutions, single pixels; and the class sums that two of these are made from.
//!
//! Values are floats, or bytes in units of one level. Budgets hold for what is stored. Random numbers come from a stream
//! per row, so that no result depends on how the rows were shared out among threads.

use super::points::order_by_class;
use super::project::{Limits, Norm};
use crate::cancel::Cancel;
use crate::element::{DType, Element, Real};
use crate::random::Random;
use crate::simd::{Kernel, LANES, dispatch};
use crate::view::{Rows, RowsMut};
use crate::{Error, Result, par};
use std::ops::Range;
use std::sync::OnceLock;

/// A stored value of an image.
pub trait Pixel: Copy + Default + PartialEq + Send + Sync + 'static {
    type Acc: Real;
    /// Rounding takes so much of an L∞ budget that a smaller reach would waste it.
    const COARSE: bool;
    /// Values are whole numbers.
    const BYTES: bool;
    fn read(self) -> Self::Acc;
    /// Rounds to nearest, ties to even; bytes expect a value from 0 to 255.
    fn write(v: Self::Acc) -> Self;
    /// Largest rounding error of a value in the box.
    fn rounding(limits: &Limits) -> f64;
    /// Stores as much of `x + delta` as the budget has room for, exactly; at leisure.
    fn fit(limits: &Limits, x: &[Self], delta: &[Self::Acc], out: &mut [Self]);
}

impl<T: Element> Pixel for T {
    type Acc = T::Acc;
    const COARSE: bool = matches!(T::DTYPE, DType::F16 | DType::BF16);
    const BYTES: bool = false;
    #[inline(always)]
    fn read(self) -> T::Acc {
        self.load()
    }
    #[inline(always)]
    fn write(v: T::Acc) -> Self {
        T::store(v)
    }
    fn rounding(limits: &Limits) -> f64 {
        let bits = match T::DTYPE {
            DType::F64 => 53,
            DType::F32 => 24,
            DType::F16 => 11,
            DType::BF16 => 8,
        };
        limits.low.abs().max(limits.high.abs()) * 2f64.powi(-bits)
    }
    fn fit(limits: &Limits, x: &[Self], delta: &[T::Acc], out: &mut [Self]) {
        limits.publish(x, delta, None, out);
    }
}

/// Adding it leaves the nearest whole number in the low bits of a float.
const WHOLE: f32 = 12_582_912.0;

impl Pixel for u8 {
    type Acc = f32;
    const COARSE: bool = false;
    const BYTES: bool = true;
    #[inline(always)]
    fn read(self) -> f32 {
        f32::from(self)
    }
    #[inline(always)]
    fn write(v: f32) -> Self {
        ((v + WHOLE).to_bits() & 0xff) as Self
    }
    fn rounding(_: &Limits) -> f64 {
        0.5
    }
    fn fit(limits: &Limits, x: &[Self], delta: &[f32], out: &mut [Self]) {
        let mut shrink = 1.0;
        loop {
            let mut squares = 0i64;
            for ((o, x), d) in out.iter_mut().zip(x).zip(delta) {
                let to = (f64::from(*x) + f64::from(*d) * shrink).round_ties_even();
                *o = to.clamp(limits.low, limits.high) as Self;
                squares += (i64::from(*o) - i64::from(*x)).pow(2);
            }
            // Whoever divides by 255 before or after the root is to find it within the budget.
            if squares as f64 <= limits.epsilon * limits.epsilon * (1.0 - 1e-12) {
                return;
            }
            shrink *= (limits.epsilon / (squares as f64).sqrt()).min(1.0 - 2f64.powi(-10));
        }
    }
}

/// How an image lies in its row: `planes` blocks of `height` lines of `width` pixels of `step` channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Image {
    pub planes: usize,
    pub height: usize,
    pub width: usize,
    pub step: usize,
}

impl Image {
    pub fn channels(&self) -> usize {
        self.planes * self.step
    }
    fn line(&self) -> usize {
        self.width * self.step
    }
    fn plane(&self) -> usize {
        self.height * self.line()
    }
    pub fn elements(&self) -> usize {
        self.planes * self.plane()
    }
    /// Place of channel `c` of the pixel in line `i`, column `j`.
    fn at(&self, c: usize, i: usize, j: usize) -> usize {
        c / self.step * self.plane() + i * self.line() + j * self.step + c % self.step
    }
}

/// Budget and box in the arithmetic type, ready for rows of one length.
struct Budget<'a, T: Pixel> {
    limits: &'a Limits,
    low: T::Acc,
    high: T::Acc,
    /// Greatest change of a value that rounding cannot carry over an L∞ budget.
    reach: T::Acc,
    /// Length of a perturbation that rounding hardly ever carries over an L2 budget.
    radius: f64,
    /// Changes as measured in the arithmetic type (squared for L2) above this are looked at again.
    most: f64,
}

impl<'a, T: Pixel> Budget<'a, T> {
    fn new(limits: &'a Limits, width: usize) -> Self {
        let (e, r) = (limits.epsilon, T::rounding(limits));
        // A measured change is the true one but for some 2^-19 of it, sums of squares included.
        let slack = 1.0 - 4e-6;
        let unit = if size_of::<T::Acc>() == 8 {
            2f64.powi(-52)
        } else {
            2f64.powi(-23)
        };
        let (reach, radius, most) = match limits.norm {
            Norm::L2 => {
                // Rounding errors of root mean square r / √3 add their squares, and a product that averages out.
                let room = (e * e * slack - width as f64 * r * r / 3.0).max(0.0).sqrt();
                (f64::INFINITY, (room - 4.0 * r).max(0.5 * e), e * e * slack)
            }
            Norm::Linf if T::BYTES => ((e + 1e-9).floor(), 0.0, f64::INFINITY),
            Norm::Linf if T::COARSE => (e, 0.0, e * slack),
            Norm::Linf => (((e - r) * (1.0 - unit)).max(0.0), 0.0, f64::INFINITY),
        };
        Self {
            limits,
            low: T::Acc::from_f64(limits.low),
            high: T::Acc::from_f64(limits.high),
            reach: T::Acc::from_f64(reach),
            radius,
            most,
        }
    }

    /// `out = x + delta` within budget and box, both exact.
    #[inline(always)]
    fn add(&self, row: usize, x: &[T], delta: &[T::Acc], out: &mut [T]) -> Result<()> {
        let kernel = Add {
            x,
            delta,
            low: self.low,
            high: self.high,
            reach: self.reach,
            out,
        };
        let (outside, size) = match self.limits.norm {
            Norm::L2 => dispatch(Measured::<T, true>(kernel)),
            Norm::Linf if T::COARSE => dispatch(Measured::<T, false>(kernel)),
            Norm::Linf => (dispatch(kernel), 0.0),
        };
        if outside {
            return Err(self.refuse(row, x));
        }
        if size > self.most {
            T::fit(self.limits, x, delta, out);
        }
        Ok(())
    }

    fn refuse(&self, row: usize, x: &[T]) -> Error {
        let inside = |v: &T| (v.read() >= self.low) & (v.read() <= self.high);
        let at = x.iter().position(|v| !inside(v)).unwrap_or(0);
        let found = x[at].read().to_f64();
        if !found.is_finite() {
            return Error::NonFinite {
                arg: "x",
                index: row * x.len() + at,
                found,
            };
        }
        let (low, high) = (self.limits.low, self.limits.high);
        Error::value("x", format!("values in the box ({low}, {high})"), found)
    }
}

struct Add<'a, T: Pixel> {
    x: &'a [T],
    delta: &'a [T::Acc],
    low: T::Acc,
    high: T::Acc,
    reach: T::Acc,
    out: &'a mut [T],
}

/// One where a value is outside the box or no number, else zero.
#[inline(always)]
fn strays<R: Real>(v: R, low: R, high: R) -> R {
    if (v >= low) & (v <= high) {
        R::ZERO
    } else {
        R::ONE
    }
}

impl<T: Pixel> Kernel for Add<'_, T> {
    /// Whether a value of `x` is outside the box.
    type Output = bool;
    #[inline(always)]
    fn run(self) -> bool {
        let (low, high, reach) = (self.low, self.high, self.reach);
        let mut outside = [T::Acc::ZERO; LANES];
        let each = |x: &T, d: T::Acc, o: &mut T, outside: &mut T::Acc| {
            let v = x.read();
            *outside += strays(v, low, high);
            *o = T::write(
                (v + d.greater(-reach).lesser(reach))
                    .greater(low)
                    .lesser(high),
            );
        };
        let (xs, x_rest) = self.x.as_chunks::<LANES>();
        let (ds, d_rest) = self.delta.as_chunks::<LANES>();
        let (os, o_rest) = self.out.as_chunks_mut::<LANES>();
        for ((x, d), o) in xs.iter().zip(ds).zip(os) {
            for i in 0..LANES {
                each(&x[i], d[i], &mut o[i], &mut outside[i]);
            }
        }
        for (((x, d), o), s) in x_rest.iter().zip(d_rest).zip(o_rest).zip(&mut outside) {
            each(x, *d, o, s);
        }
        outside.iter().any(|s| *s > T::Acc::ZERO)
    }
}

/// [`Add`] that measures what was stored: the sum of squares of the changes, or the largest.
struct Measured<'a, T: Pixel, const SQUARES: bool>(Add<'a, T>);

impl<T: Pixel, const SQUARES: bool> Kernel for Measured<'_, T, SQUARES> {
    type Output = (bool, f64);
    #[inline(always)]
    fn run(self) -> (bool, f64) {
        let Add {
            x,
            delta,
            low,
            high,
            reach,
            out,
        } = self.0;
        let mut outside = [T::Acc::ZERO; LANES];
        let mut size = [T::Acc::ZERO; LANES];
        let each = |x: &T, d: T::Acc, o: &mut T, outside: &mut T::Acc, size: &mut T::Acc| {
            let v = x.read();
            *outside += strays(v, low, high);
            *o = T::write(
                (v + d.greater(-reach).lesser(reach))
                    .greater(low)
                    .lesser(high),
            );
            let change = o.read() - v;
            if SQUARES {
                *size += change * change;
            } else {
                *size = change.greater(-change).greater(*size);
            }
        };
        let (xs, x_rest) = x.as_chunks::<LANES>();
        let (ds, d_rest) = delta.as_chunks::<LANES>();
        let (os, o_rest) = out.as_chunks_mut::<LANES>();
        for ((x, d), o) in xs.iter().zip(ds).zip(os) {
            for i in 0..LANES {
                each(&x[i], d[i], &mut o[i], &mut outside[i], &mut size[i]);
            }
        }
        for (i, ((x, d), o)) in x_rest.iter().zip(d_rest).zip(o_rest).enumerate() {
            each(x, *d, o, &mut outside[i], &mut size[i]);
        }
        let sizes = size.iter().map(|s| s.to_f64());
        let size = if SQUARES {
            sizes.sum()
        } else {
            sizes.fold(0.0, f64::max)
        };
        (outside.iter().any(|s| *s > T::Acc::ZERO), size)
    }
}

fn bytes<T>(rows: usize, width: usize) -> usize {
    2 * rows * width * size_of::<T>()
}

/// Runs `f(first row, rows of out)` over runs of a multiple of `unit` rows.
fn over<T: Pixel>(
    out: RowsMut<'_, T>,
    unit: usize,
    cancel: &Cancel,
    f: impl Fn(usize, &mut [T]) -> Result<()> + Send + Sync,
) -> Result<()> {
    let (n, width) = (out.rows(), out.width());
    let rows = par::ITEM_BYTES / (width * size_of::<T>()).max(1);
    let runs = out.into_runs(rows.next_multiple_of(unit).max(unit));
    let done = par::try_map(bytes::<T>(n, width), runs, |run| {
        cancel.check()?;
        f(run.first, run.data)?;
        cancel.advance((run.data.len() / width) as u64);
        Ok(())
    });
    done.map(|_| ())
}

/// `out = x + pattern of the row's class`, within budget and box.
///
/// # Errors
/// `Value` or `NonFinite` for a value outside the box; `Interrupted`.
pub fn add_class<T: Pixel>(
    x: &Rows<'_, T>,
    labels: &[u32],
    patterns: &[T::Acc],
    limits: &Limits,
    out: RowsMut<'_, T>,
    cancel: &Cancel,
) -> Result<()> {
    let d = x.width();
    let budget = Budget::<T>::new(limits, d);
    let mut patterns = patterns.to_vec();
    if limits.norm == Norm::L2 {
        for pattern in patterns.chunks_exact_mut(d.max(1)) {
            let length = (pattern.iter().map(|v| v.to_f64() * v.to_f64()).sum::<f64>()).sqrt();
            if length > budget.radius {
                scale(pattern, budget.radius / length);
            }
        }
    }
    over(out, 1, cancel, |first, rows| {
        for (i, out) in rows.chunks_exact_mut(d).enumerate() {
            let row = first + i;
            let c = labels[row] as usize;
            budget.add(row, x.row(row), &patterns[c * d..(c + 1) * d], out)?;
        }
        Ok(())
    })
}

fn scale<R: Real>(v: &mut [R], by: f64) {
    v.iter_mut().for_each(|v| *v = R::from_f64(v.to_f64() * by));
}

/// Resolution of the normal distribution.
const QUANTILES: usize = 4096;

/// The quantile of a probability below one half of the standard normal distribution (Wichura 1988, AS 241 in its
/// seven-figure form).
fn lower_quantile(p: f64) -> f64 {
    let polynomial = |c: &[f64], r: f64| c.iter().rev().fold(0.0, |sum, c| sum * r + c);
    let q = p - 0.5;
    if q.abs() <= 0.425 {
        let r = 0.180_625 - q * q;
        return q * polynomial(
            &[
                3.387_132_717_9,
                50.434_271_938,
                159.291_132_02,
                59.109_374_720,
            ],
            r,
        ) / polynomial(&[1.0, 17.895_169_469, 78.757_757_664, 67.187_563_600], r);
    }
    let r = (-p.ln()).sqrt();
    // Beyond 5 stands a third pair of polynomials, for probabilities below 1.4e-11.
    let r = r - 1.6;
    let a = [
        1.423_437_277_7,
        2.756_815_390_0,
        1.306_728_481_6,
        0.170_238_211_03,
    ];
    let b = [1.0, 0.737_001_642_50, 0.120_211_329_75];
    -polynomial(&a, r) / polynomial(&b, r)
}

/// Middles of [`QUANTILES`] parts of equal probability of the standard normal distribution, scaled to variance one.
fn quantiles() -> &'static [f32; QUANTILES] {
    static TABLE: OnceLock<Box<[f32; QUANTILES]>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut table = Box::new([0.0; QUANTILES]);
        let lower: Vec<f64> = (0..QUANTILES / 2)
            .map(|k| lower_quantile((k as f64 + 0.5) / QUANTILES as f64))
            .collect();
        let variance = 2.0 * lower.iter().map(|q| q * q).sum::<f64>() / QUANTILES as f64;
        for (k, q) in lower.iter().enumerate() {
            let q = (q / variance.sqrt()) as f32;
            table[k] = q;
            table[QUANTILES - 1 - k] = -q;
        }
        table
    })
}

/// Standard normal numbers on [`QUANTILES`] levels, five from each word of the generator.
struct Normals {
    random: Random,
    word: u64,
    left: u32,
    table: &'static [f32; QUANTILES],
}

impl Normals {
    fn new(random: Random) -> Self {
        Self {
            random,
            word: 0,
            left: 0,
            table: quantiles(),
        }
    }

    #[inline(always)]
    fn draw(&mut self) -> f32 {
        if self.left == 0 {
            self.word = self.random.bits();
            self.left = 5;
        }
        let k = self.word as usize % QUANTILES;
        self.word >>= QUANTILES.trailing_zeros();
        self.left -= 1;
        self.table[k]
    }
}

/// Clusters of a class each, as scikit-learn's `make_classification` draws them: `centroid + z A`, z standard normal.
#[derive(Debug, Clone, Copy)]
pub struct Separable<'a> {
    /// Classes × features.
    pub centroids: &'a [f32],
    /// Classes × features × features.
    pub mixing: &'a [f32],
    pub image: Image,
    /// Side of the square of pixels that share a feature.
    pub patch: usize,
}

impl Separable<'_> {
    /// Lines and columns of the grid of patches.
    pub fn grid(image: &Image, patch: usize) -> (usize, usize) {
        (image.height.div_ceil(patch), image.width.div_ceil(patch))
    }

    /// Values of a row that each feature fills.
    fn areas(&self) -> Vec<f64> {
        let (lines, columns) = Self::grid(&self.image, self.patch);
        let side = |k: usize, length: usize| self.patch.min(length - k * self.patch) as f64;
        let grid = (0..lines).flat_map(|a| {
            (0..columns).map(move |b| side(a, self.image.height) * side(b, self.image.width))
        });
        let grid: Vec<f64> = grid.collect();
        grid.repeat(self.image.channels())
    }
}

struct Mix<'a> {
    z: &'a [f32],
    centroid: &'a [f32],
    mixing: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Mix<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        self.out.copy_from_slice(self.centroid);
        for (z, row) in self.z.iter().zip(self.mixing.chunks_exact(self.out.len())) {
            for (o, a) in self.out.iter_mut().zip(row) {
                *o += z * a;
            }
        }
    }
}

/// Adds patches that are linearly separable by class (Yu et al. 2022): in L2 scaled to the sphere, in L∞ the signs.
///
/// # Errors
/// As [`add_class`].
pub fn add_separable<T: Pixel>(
    x: &Rows<'_, T>,
    labels: &[u32],
    plan: &Separable<'_>,
    seed: u64,
    limits: &Limits,
    out: RowsMut<'_, T>,
    cancel: &Cancel,
) -> Result<()> {
    let d = x.width();
    let budget = Budget::<T>::new(limits, d);
    let areas = plan.areas();
    let k = areas.len();
    over(out, 1, cancel, |first, rows| {
        let (mut z, mut features) = (vec![0f32; k], vec![0f32; k]);
        let mut delta = vec![T::Acc::ZERO; d];
        for (i, out) in rows.chunks_exact_mut(d).enumerate() {
            let row = first + i;
            let c = labels[row] as usize;
            let mut normals = Normals::new(Random::stream(seed, row as u64));
            z.iter_mut().for_each(|z| *z = normals.draw());
            dispatch(Mix {
                z: &z,
                centroid: &plan.centroids[c * k..(c + 1) * k],
                mixing: &plan.mixing[c * k * k..(c + 1) * k * k],
                out: &mut features,
            });
            match limits.norm {
                Norm::L2 => {
                    let squares = features
                        .iter()
                        .zip(&areas)
                        .map(|(f, a)| f64::from(*f).powi(2) * a);
                    let by = budget.radius / squares.sum::<f64>().sqrt();
                    features
                        .iter_mut()
                        .for_each(|f| *f = (f64::from(*f) * by) as f32);
                }
                Norm::Linf => {
                    let reach = budget.reach.to_f64() as f32;
                    features.iter_mut().for_each(|f| *f = reach.copysign(*f));
                }
            }
            spread(&features, &plan.image, plan.patch, &mut delta);
            budget.add(row, x.row(row), &delta, out)?;
        }
        Ok(())
    })
}

/// Fills every patch of an image with its feature.
fn spread<R: Real>(features: &[f32], image: &Image, patch: usize, out: &mut [R]) {
    let (lines, columns) = Separable::grid(image, patch);
    let length = image.line();
    let cells = lines * columns;
    for (p, plane) in out.chunks_exact_mut(image.plane()).enumerate() {
        for (a, block) in plane.chunks_mut(patch * length).enumerate() {
            let (line, rest) = block.split_at_mut(length);
            for s in 0..image.step {
                let from = (p * image.step + s) * cells + a * columns;
                if image.step == 1 {
                    for (cell, f) in line.chunks_mut(patch).zip(&features[from..]) {
                        cell.fill(R::from_f64(f64::from(*f)));
                    }
                } else {
                    for j in 0..image.width {
                        line[j * image.step + s] =
                            R::from_f64(f64::from(features[from + j / patch]));
                    }
                }
            }
            for copy in rest.chunks_exact_mut(length) {
                copy.copy_from_slice(line);
            }
        }
    }
}

/// Images whose processes run side by side.
const SIDE: usize = 16;
/// Values of the window that a value of the process is computed from.
pub const TAPS: usize = 8;

/// An autoregressive process per class and channel: every value of the plane is a sum over its 3 × 3 window.
#[derive(Debug, Clone, Copy)]
pub struct Autoregressive<'a> {
    /// Classes × channels × [`TAPS`]: the window line by line, without the value itself.
    pub filters: &'a [f32],
    pub image: Image,
    /// First lines and columns that are computed and dropped.
    pub crop: usize,
}

/// Fills a plane of `SIDE` interleaved images from its first two lines and columns.
struct Raster<'a> {
    plane: &'a mut [[f32; SIDE]],
    taps: [[f32; SIDE]; TAPS],
    width: usize,
}

impl Kernel for Raster<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let t = &self.taps;
        let w = self.width;
        let lines = self.plane.len() / w;
        for i in 2..lines {
            let (above, line) = self.plane.split_at_mut(i * w);
            let (up2, up1) = (&above[(i - 2) * w..(i - 1) * w], &above[(i - 1) * w..]);
            let line = &mut line[..w];
            let (mut back2, mut back1) = (line[0], line[1]);
            for j in 2..w {
                let mut next = [0f32; SIDE];
                for l in 0..SIDE {
                    let over =
                        t[0][l] * up2[j - 2][l] + t[1][l] * up2[j - 1][l] + t[2][l] * up2[j][l];
                    let own =
                        t[3][l] * up1[j - 2][l] + t[4][l] * up1[j - 1][l] + t[5][l] * up1[j][l];
                    // The value before comes last: it is the one that has to be waited for.
                    next[l] = (over + own + t[6][l] * back2[l]) + t[7][l] * back1[l];
                }
                line[j] = next;
                (back2, back1) = (back1, next);
            }
        }
    }
}

/// Per image, the sum of squares or the largest magnitude of a plane's kept part.
struct Size<'a> {
    plane: &'a [[f32; SIDE]],
    width: usize,
    crop: usize,
    squares: bool,
}

impl Kernel for Size<'_> {
    type Output = [f64; SIDE];
    #[inline(always)]
    fn run(self) -> [f64; SIDE] {
        let mut total = [0f64; SIDE];
        for line in self.plane.chunks_exact(self.width).skip(self.crop) {
            let mut part = [0f32; SIDE];
            for v in &line[self.crop..] {
                for l in 0..SIDE {
                    part[l] = if self.squares {
                        part[l] + v[l] * v[l]
                    } else {
                        v[l].abs().greater(part[l])
                    };
                }
            }
            for l in 0..SIDE {
                let part = f64::from(part[l]);
                total[l] = if self.squares {
                    total[l] + part
                } else {
                    part.greater(total[l])
                };
            }
        }
        total
    }
}

/// Takes the images apart: `out[l][p] = by[l] * line[p][l]`.
struct Apart<'a, R> {
    line: &'a [[f32; SIDE]],
    by: &'a [f32; SIDE],
    /// Distance of an image's values from the next image's.
    stride: usize,
    out: &'a mut [R],
}

impl<R: Real> Kernel for Apart<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let (tiles, rest) = self.line.as_chunks::<SIDE>();
        for (k, tile) in tiles.iter().enumerate() {
            for (l, by) in self.by.iter().enumerate() {
                let out = &mut self.out[l * self.stride + k * SIDE..][..SIDE];
                for (o, side) in out.iter_mut().zip(tile) {
                    *o = R::from_f64(f64::from(side[l] * by));
                }
            }
        }
        let done = tiles.len() * SIDE;
        for l in 0..SIDE {
            for (p, v) in rest.iter().enumerate() {
                self.out[l * self.stride + done + p] = R::from_f64(f64::from(v[l] * self.by[l]));
            }
        }
    }
}

/// The processes of up to [`SIDE`] rows from `first`, each from its own stream; `planes` gets one block per channel.
fn grow(
    plan: &Autoregressive<'_>,
    labels: &[u32],
    first: usize,
    seed: u64,
    planes: &mut [[f32; SIDE]],
) {
    let channels = plan.image.channels();
    let (lines, w) = (plan.image.height + plan.crop, plan.image.width + plan.crop);
    for (c, plane) in planes.chunks_exact_mut(lines * w).enumerate() {
        let mut taps = [[0f32; SIDE]; TAPS];
        for (l, label) in labels.iter().enumerate() {
            let at = (*label as usize * channels + c) * TAPS;
            for (t, b) in taps.iter_mut().zip(&plan.filters[at..at + TAPS]) {
                t[l] = *b;
            }
            let stream = ((first + l) * channels + c) as u64;
            let mut normals = Normals::new(Random::stream(seed, stream));
            for v in &mut plane[..2 * w] {
                v[l] = normals.draw();
            }
            for line in plane[2 * w..].chunks_exact_mut(w) {
                line[0][l] = normals.draw();
                line[1][l] = normals.draw();
            }
        }
        dispatch(Raster {
            plane,
            taps,
            width: w,
        });
    }
}

/// Adds one draw of the class's autoregressive processes to every row (Sandoval-Segura et al. 2022), scaled to the budget.
///
/// # Errors
/// As [`add_class`]; `Degenerate` if a process vanishes or diverges.
pub fn add_autoregressive<T: Pixel>(
    x: &Rows<'_, T>,
    labels: &[u32],
    plan: &Autoregressive<'_>,
    seed: u64,
    limits: &Limits,
    out: RowsMut<'_, T>,
    cancel: &Cancel,
) -> Result<()> {
    let (d, image, crop) = (x.width(), plan.image, plan.crop);
    let budget = Budget::<T>::new(limits, d);
    let (lines, w) = (image.height + crop, image.width + crop);
    over(out, SIDE, cancel, |first, rows| {
        let mut planes = vec![[0f32; SIDE]; image.channels() * lines * w];
        let mut delta = vec![T::Acc::ZERO; SIDE * d];
        let mut line = vec![[0f32; SIDE]; image.line()];
        for (block, out) in rows.chunks_mut(SIDE * d).enumerate() {
            let first = first + block * SIDE;
            let count = out.len() / d;
            grow(
                plan,
                &labels[first..first + count],
                first,
                seed,
                &mut planes,
            );
            let squares = limits.norm == Norm::L2;
            let mut size = [0f64; SIDE];
            for plane in planes.chunks_exact(lines * w) {
                let part = dispatch(Size {
                    plane,
                    width: w,
                    crop,
                    squares,
                });
                for (s, p) in size.iter_mut().zip(part) {
                    *s = if squares { *s + p } else { s.max(p) };
                }
            }
            let mut by = [0f32; SIDE];
            for (l, size) in size.iter().enumerate().take(count) {
                if !(size.is_finite() && *size > 0.0) {
                    let reason = format!(
                        "the process of class {} vanishes or diverges",
                        labels[first + l]
                    );
                    return Err(Error::degenerate("filters", reason));
                }
                by[l] = match limits.norm {
                    Norm::L2 => budget.radius / size.sqrt(),
                    Norm::Linf => budget.reach.to_f64() / size,
                } as f32;
            }
            for p in 0..image.planes {
                for i in 0..image.height {
                    let place = |c: usize| (c * lines + i + crop) * w + crop;
                    let at = p * image.plane() + i * image.line();
                    let source = if image.step == 1 {
                        &planes[place(p)..place(p) + image.width]
                    } else {
                        for s in 0..image.step {
                            let from = place(p * image.step + s);
                            for j in 0..image.width {
                                line[j * image.step + s] = planes[from + j];
                            }
                        }
                        &line[..]
                    };
                    dispatch(Apart {
                        line: source,
                        by: &by,
                        stride: d,
                        out: &mut delta[at..],
                    });
                }
            }
            for (i, out) in out.chunks_exact_mut(d).enumerate() {
                budget.add(first + i, x.row(first + i), &delta[i * d..(i + 1) * d], out)?;
            }
        }
        Ok(())
    })
}

/// Draws of the processes as they are: rows of `image`, neither scaled nor added to anything.
pub fn processes(plan: &Autoregressive<'_>, labels: &[u32], seed: u64) -> Vec<f32> {
    let (image, crop) = (plan.image, plan.crop);
    let (lines, w) = (image.height + crop, image.width + crop);
    let mut planes = vec![[0f32; SIDE]; image.channels() * lines * w];
    let mut out = vec![0f32; labels.len() * image.elements()];
    for (block, labels) in labels.chunks(SIDE).enumerate() {
        grow(plan, labels, block * SIDE, seed, &mut planes);
        for l in 0..labels.len() {
            let row = &mut out[(block * SIDE + l) * image.elements()..][..image.elements()];
            for c in 0..image.channels() {
                for i in 0..image.height {
                    for j in 0..image.width {
                        row[image.at(c, i, j)] = planes[(c * lines + i + crop) * w + crop + j][l];
                    }
                }
            }
        }
    }
    out
}

/// Correlation of a padded plane with a 3 × 3 kernel; one stretch of memory, so that short lines cost nothing.
struct Correlate<'a, R> {
    padded: &'a [R],
    kernel: [R; 9],
    line: usize,
    step: usize,
    out: &'a mut [R],
}

impl<R: Real> Kernel for Correlate<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let n = self.out.len();
        let k = self.kernel;
        let tap = |t: usize| &self.padded[t / 3 * self.line + t % 3 * self.step..][..n];
        let x = [
            tap(0),
            tap(1),
            tap(2),
            tap(3),
            tap(4),
            tap(5),
            tap(6),
            tap(7),
            tap(8),
        ];
        for (i, o) in self.out.iter_mut().enumerate() {
            let a = k[0] * x[0][i] + k[1] * x[1][i] + k[2] * x[2][i];
            let b = k[3] * x[3][i] + k[4] * x[4][i] + k[5] * x[5][i];
            let c = k[6] * x[6][i] + k[7] * x[7][i] + k[8] * x[8][i];
            *o = a + b + c;
        }
    }
}

struct Top<'a, R>(&'a [R]);

impl<R: Real> Kernel for Top<'_, R> {
    type Output = R;
    #[inline(always)]
    fn run(self) -> R {
        let mut most = [R::ZERO; LANES];
        let (blocks, rest) = self.0.as_chunks::<LANES>();
        for block in blocks {
            for i in 0..LANES {
                most[i] = block[i].greater(most[i]);
            }
        }
        rest.iter().chain(&most).fold(R::ZERO, |m, v| v.greater(m))
    }
}

/// `out = round(v / by * top)`.
struct Divide<'a, T: Pixel> {
    v: &'a [T::Acc],
    by: T::Acc,
    top: T::Acc,
    truncate: bool,
    out: &'a mut [T],
}

impl<T: Pixel> Kernel for Divide<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let (by, top) = (self.by, self.top);
        if self.truncate {
            for (o, v) in self.out.iter_mut().zip(self.v) {
                let value = (*v / by * top).to_f64();
                *o = T::write(T::Acc::from_f64(f64::from(value as i32)));
            }
        } else {
            for (o, v) in self.out.iter_mut().zip(self.v) {
                *o = T::write(*v / by * top);
            }
        }
    }
}

/// Loads a row into planes with one line of zeros above and below and `step` zeros after each line; says whether a
/// value is outside `0..=high`.
struct Pad<'a, T: Pixel> {
    x: &'a [T],
    line: usize,
    gap: usize,
    high: T::Acc,
    out: &'a mut [T::Acc],
}

impl<T: Pixel> Kernel for Pad<'_, T> {
    type Output = bool;
    #[inline(always)]
    fn run(self) -> bool {
        let mut outside = T::Acc::ZERO;
        let lines = self
            .x
            .chunks_exact(self.line)
            .zip(self.out.chunks_exact_mut(self.line + self.gap));
        for (from, to) in lines {
            let mut strayed = T::Acc::ZERO;
            for (o, x) in to.iter_mut().zip(from) {
                *o = x.read();
                strayed = strays(*o, T::Acc::ZERO, self.high).greater(strayed);
            }
            outside = strayed.greater(outside);
        }
        outside > T::Acc::ZERO
    }
}

/// Correlates every image with the 3 × 3 kernel of its class (zeros around it, the same for all channels) and divides
/// it by its own largest value (Sadasivan et al. 2023). An image of zeros stays. `high` is the value of white.
///
/// # Errors
/// `Value` or `NonFinite` for a value outside `0..=high`; `Interrupted`.
#[allow(clippy::too_many_arguments)]
pub fn convolve<T: Pixel>(
    x: &Rows<'_, T>,
    labels: &[u32],
    kernels: &[f64],
    image: &Image,
    high: f64,
    truncate: bool,
    out: RowsMut<'_, T>,
    cancel: &Cancel,
) -> Result<()> {
    let d = x.width();
    let limits = Limits {
        norm: Norm::Linf,
        epsilon: high,
        low: 0.0,
        high,
    };
    let budget = Budget::<T>::new(&limits, d);
    let gap = image.step;
    let (length, padded) = (image.line(), image.line() + gap);
    over(out, 1, cancel, |first, rows| {
        // The gap after a line is also the one before the next; the first line has one of its own.
        let stretch = image.height * padded;
        let mut around = vec![T::Acc::ZERO; gap + stretch + 2 * padded + gap];
        let mut sums = vec![T::Acc::ZERO; image.planes * stretch];
        let mut whole = vec![T::default(); image.planes * stretch];
        for (i, out) in rows.chunks_exact_mut(d).enumerate() {
            let (row, c) = (first + i, labels[first + i] as usize);
            let mut kernel = [T::Acc::ZERO; 9];
            for (k, v) in kernel.iter_mut().zip(&kernels[c * 9..]) {
                *k = T::Acc::from_f64(*v);
            }
            for (p, sums) in sums.chunks_exact_mut(stretch).enumerate() {
                let plane = &x.row(row)[p * image.plane()..(p + 1) * image.plane()];
                let outside = dispatch(Pad {
                    x: plane,
                    line: length,
                    gap,
                    high: budget.high,
                    out: &mut around[gap + padded..gap + padded + stretch],
                });
                if outside {
                    return Err(budget.refuse(row, x.row(row)));
                }
                dispatch(Correlate {
                    padded: &around,
                    kernel,
                    line: padded,
                    step: gap,
                    out: sums,
                });
                for line in sums.chunks_exact_mut(padded) {
                    line[length..].fill(T::Acc::ZERO);
                }
            }
            let top = dispatch(Top(&sums));
            if top <= T::Acc::ZERO {
                out.copy_from_slice(x.row(row));
                continue;
            }
            dispatch(Divide {
                v: &sums,
                by: top,
                top: budget.high,
                truncate,
                out: &mut whole,
            });
            let lines = whole.chunks_exact(padded).map(|line| &line[..length]);
            for (to, from) in out.chunks_exact_mut(length).zip(lines) {
                to.copy_from_slice(from);
            }
        }
        Ok(())
    })
}

/// Pixels and their colours by class.
#[derive(Debug, Clone, Copy)]
pub struct Dots<'a> {
    /// Classes × `per` pixels, counted line by line.
    pub places: &'a [usize],
    /// Classes × `per` × channels, in units of the data.
    pub colours: &'a [f64],
    pub per: usize,
    pub image: Image,
}

/// Copies every row and sets the pixels of its class to their colours (Wu et al. 2023).
///
/// # Errors
/// `Interrupted`.
pub fn set_pixels<T: Pixel>(
    x: &Rows<'_, T>,
    labels: &[u32],
    dots: &Dots<'_>,
    out: RowsMut<'_, T>,
    cancel: &Cancel,
) -> Result<()> {
    let (d, per, image) = (x.width(), dots.per, dots.image);
    let channels = image.channels();
    let place = |pixel: usize, c: usize| image.at(c, pixel / image.width, pixel % image.width);
    // By class, (place in the row, value).
    let writes: Vec<(usize, T)> = (dots.places.iter().enumerate())
        .flat_map(|(k, pixel)| (0..channels).map(move |c| (k, *pixel, c)))
        .map(|(k, pixel, c)| {
            let value = T::Acc::from_f64(dots.colours[k * channels + c]);
            (place(pixel, c), T::write(value))
        })
        .collect();
    let each = per * channels;
    over(out, 1, cancel, |first, rows| {
        for (i, out) in rows.chunks_exact_mut(d).enumerate() {
            out.copy_from_slice(x.row(first + i));
            let class = labels[first + i] as usize;
            for (at, value) in &writes[class * each..(class + 1) * each] {
                out[*at] = *value;
            }
        }
        Ok(())
    })
}

/// Sums by class and feature.
#[derive(Debug, Clone, PartialEq)]
pub struct ClassSums {
    pub counts: Vec<usize>,
    /// Classes × features.
    pub sums: Vec<f64>,
    /// The same of the squares.
    pub squares: Vec<f64>,
}

/// Rows that are added up in the arithmetic type (exactly, for bytes) before they go to f64.
const GROUP: usize = 16;
/// Partial sums larger than this are not kept once per thread.
const LARGE: usize = 1 << 22;

struct Accumulate<'a, T: Pixel> {
    rows: &'a [&'a [T]],
    sums: &'a mut [f64],
    squares: &'a mut [f64],
    low: T::Acc,
    high: T::Acc,
}

impl<T: Pixel> Kernel for Accumulate<'_, T> {
    type Output = bool;
    #[inline(always)]
    fn run(self) -> bool {
        let d = self.sums.len();
        let mut outside = [T::Acc::ZERO; LANES];
        for start in (0..d).step_by(LANES) {
            let n = LANES.min(d - start);
            let (mut sum, mut square) = ([T::Acc::ZERO; LANES], [T::Acc::ZERO; LANES]);
            for row in self.rows {
                let mut each = |i: usize, v: T| {
                    let v = v.read();
                    outside[i] += strays(v, self.low, self.high);
                    sum[i] += v;
                    square[i] += v * v;
                };
                match <&[T; LANES]>::try_from(&row[start..start + n]) {
                    Ok(block) => (0..LANES).for_each(|i| each(i, block[i])),
                    Err(_) => (0..n).for_each(|i| each(i, row[start + i])),
                }
            }
            for i in 0..n {
                self.sums[start + i] += sum[i].to_f64();
                self.squares[start + i] += square[i].to_f64();
            }
        }
        outside.iter().any(|s| *s > T::Acc::ZERO)
    }
}

/// Sums and sums of squares of every feature by class, in one pass.
///
/// # Errors
/// `Value` or `NonFinite` for a value outside `low..=high`; `Interrupted`.
pub fn class_sums<T: Pixel>(
    x: &Rows<'_, T>,
    labels: &[u32],
    classes: usize,
    (low, high): (f64, f64),
    cancel: &Cancel,
) -> Result<ClassSums> {
    let (n, d) = (x.rows(), x.width());
    let limits = Limits {
        norm: Norm::Linf,
        epsilon: 0.0,
        low,
        high,
    };
    let budget = Budget::<T>::new(&limits, d);
    let step = if classes * d > LARGE {
        n
    } else {
        n.div_ceil(8).max(1024)
    };
    let part = |range: Range<usize>| -> Result<ClassSums> {
        let rows: Vec<u32> = range.map(|i| i as u32).collect();
        let (order, segments) = order_by_class(labels, classes, &rows);
        let mut found = ClassSums {
            counts: vec![0; classes],
            sums: vec![0.0; classes * d],
            squares: vec![0.0; classes * d],
        };
        for (c, segment) in segments.iter().enumerate() {
            cancel.check()?;
            found.counts[c] = segment.len();
            for group in order[segment.clone()].chunks(GROUP) {
                let rows: Vec<&[T]> = group.iter().map(|i| x.row(*i as usize)).collect();
                let outside = dispatch(Accumulate {
                    rows: &rows,
                    sums: &mut found.sums[c * d..(c + 1) * d],
                    squares: &mut found.squares[c * d..(c + 1) * d],
                    low: budget.low,
                    high: budget.high,
                });
                if outside {
                    let inside = |v: &T| (v.read() >= budget.low) & (v.read() <= budget.high);
                    let bad = group
                        .iter()
                        .find(|i| !x.row(**i as usize).iter().all(inside));
                    let row = bad.map_or(0, |i| *i as usize);
                    return Err(budget.refuse(row, x.row(row)));
                }
            }
        }
        Ok(found)
    };
    let parts = par::try_map(n * d * size_of::<T>(), par::ranges(n, step), part)?;
    let mut parts = parts.into_iter();
    let Some(mut total) = parts.next() else {
        return Ok(ClassSums {
            counts: vec![0; classes],
            sums: vec![0.0; classes * d],
            squares: vec![0.0; classes * d],
        });
    };
    for part in parts {
        for (t, p) in total.counts.iter_mut().zip(part.counts) {
            *t += p;
        }
        for (t, p) in total.sums.iter_mut().zip(part.sums) {
            *t += p;
        }
        for (t, p) in total.squares.iter_mut().zip(part.squares) {
            *t += p;
        }
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::for_each_level;
    use half::{bf16, f16};

    fn random(n: usize, seed: u64) -> Vec<f64> {
        let mut r = Random::new(seed);
        (0..n).map(|_| (r.symmetric() + 1.0) / 2.0).collect()
    }

    fn stored<T: Pixel>(values: &[f64], top: f64) -> Vec<T> {
        values
            .iter()
            .map(|v| T::write(T::Acc::from_f64(v * top)))
            .collect()
    }

    fn limits(norm: Norm, epsilon: f64, high: f64) -> Limits {
        Limits {
            norm,
            epsilon,
            low: 0.0,
            high,
        }
    }

    fn length(norm: Norm, change: impl Iterator<Item = f64>) -> f64 {
        match norm {
            Norm::L2 => change.map(|c| c * c).sum::<f64>().sqrt(),
            Norm::Linf => change.fold(0.0, |m, c| m.max(c.abs())),
        }
    }

    const IMAGE: Image = Image {
        planes: 1,
        height: 6,
        width: 5,
        step: 3,
    };
    const ROWS: usize = 37;
    const CLASSES: usize = 4;

    fn labels() -> Vec<u32> {
        (0..ROWS).map(|i| (i * 7 % 5 % CLASSES) as u32).collect()
    }

    fn each_noise<T: Pixel>(top: f64, norm: Norm, epsilon: f64) -> Vec<Vec<T>> {
        let d = IMAGE.elements();
        let x: Vec<T> = stored(&random(ROWS * d, 1), top);
        let rows = Rows::matrix(&x, d);
        let (labels, never) = (labels(), Cancel::new());
        let l = limits(norm, epsilon, top);
        let run = |f: &dyn Fn(RowsMut<'_, T>) -> Result<()>| {
            let mut out = vec![T::default(); x.len()];
            f(RowsMut::matrix(&mut out, d)).unwrap();
            out
        };
        let signs: Vec<T::Acc> = random(CLASSES * d, 2)
            .iter()
            .map(|v| T::Acc::from_f64((v - 0.5).signum() * epsilon))
            .collect();
        let k = 3 * 3 * 3;
        let centroids: Vec<f32> = random(CLASSES * k, 3)
            .iter()
            .map(|v| (v - 0.5).signum() as f32 * 10.0)
            .collect();
        let mixing: Vec<f32> = random(CLASSES * k * k, 4)
            .iter()
            .map(|v| (2.0 * v - 1.0) as f32)
            .collect();
        let plan = Separable {
            centroids: &centroids,
            mixing: &mixing,
            image: IMAGE,
            patch: 2,
        };
        let filters: Vec<f32> = [0.2, 0.1, 0.3, -0.1, 0.05, 0.15, 0.1, 0.2].repeat(3 * CLASSES);
        let process = Autoregressive {
            filters: &filters,
            image: IMAGE,
            crop: 2,
        };
        vec![
            run(&|out| add_class(&rows, &labels, &signs, &l, out, &never)),
            run(&|out| add_separable(&rows, &labels, &plan, 5, &l, out, &never)),
            run(&|out| add_autoregressive(&rows, &labels, &process, 5, &l, out, &never)),
            x.clone(),
        ]
    }

    fn keeps_the_budget<T: Pixel + std::fmt::Debug>(top: f64) {
        let d = IMAGE.elements();
        for (norm, epsilon) in [
            (Norm::Linf, 8.0 / 255.0),
            (Norm::L2, 0.4),
            (Norm::Linf, 0.3),
            (Norm::L2, 3.0),
        ] {
            let epsilon = epsilon * top;
            let mut made = each_noise::<T>(top, norm, epsilon);
            let x = made.pop().unwrap();
            for (which, out) in made.iter().enumerate() {
                let mut full = 0.0f64;
                for (a, b) in out.chunks(d).zip(x.chunks(d)) {
                    let change = a
                        .iter()
                        .zip(b)
                        .map(|(a, b)| a.read().to_f64() - b.read().to_f64());
                    let size = length(norm, change);
                    assert!(size <= epsilon, "{which} {norm:?} {size} > {epsilon}");
                    full = full.max(size);
                    assert!(a.iter().all(|v| (0.0..=top).contains(&v.read().to_f64())));
                }
                // Hardly anything of the budget is given away, but for what the box cuts off.
                assert!(
                    full > 0.85 * epsilon,
                    "{which} {norm:?} {full} of {epsilon}"
                );
            }
        }
    }

    #[test]
    fn budgets_hold_for_what_is_stored() {
        keeps_the_budget::<u8>(255.0);
        keeps_the_budget::<f16>(1.0);
        keeps_the_budget::<bf16>(1.0);
        keeps_the_budget::<f32>(1.0);
        keeps_the_budget::<f64>(1.0);
    }

    #[test]
    fn the_same_bits_everywhere() {
        let before = par::num_threads();
        let mut seen: Vec<Vec<Vec<f32>>> = Vec::new();
        for_each_level(|_| {
            for threads in [1, 3] {
                par::set_num_threads(threads);
                seen.push(each_noise(1.0, Norm::L2, 0.4));
            }
        });
        par::set_num_threads(before);
        assert!(seen.windows(2).all(|w| w[0] == w[1]));
    }

    #[test]
    fn patterns_are_added_and_clipped() {
        let x = [0.0f32, 0.5, 1.0, 0.25];
        let mut out = [9.0f32; 4];
        let pattern = [0.1f32, -0.2, 0.1, 0.05];
        let l = limits(Norm::Linf, 0.1, 1.0);
        let never = Cancel::new();
        add_class(
            &Rows::matrix(&x, 4),
            &[0],
            &pattern,
            &l,
            RowsMut::matrix(&mut out, 4),
            &never,
        )
        .unwrap();
        for (o, e) in out.iter().zip([0.1, 0.4, 1.0, 0.3]) {
            assert!((o - e).abs() < 1e-6, "{out:?}");
        }
        for (bad, index) in [(1.5, "got 1.5"), (f32::NAN, "flat index 6"), (-0.1, "box")] {
            let mut x = [0.5f32; 8];
            x[6] = bad;
            let mut out = [0.0f32; 8];
            let found = add_class(
                &Rows::matrix(&x, 4),
                &[0, 0],
                &pattern,
                &l,
                RowsMut::matrix(&mut out, 4),
                &never,
            );
            assert!(found.unwrap_err().to_string().contains(index));
        }
    }

    /// Reference vector 9.3: the process, its own annihilation, crop and norm.
    #[test]
    fn the_process_of_the_reference() {
        let start = [
            [0.5, -1.0, 0.25, 0.75, -0.5],
            [1.0, 0.1, -0.2, 0.4, 0.3],
            [-0.3, 0.6, 0.0, 0.0, 0.0],
            [0.2, -0.7, 0.0, 0.0, 0.0],
            [0.9, -0.4, 0.0, 0.0, 0.0],
        ];
        let b = [0.2f32, 0.1, 0.3, -0.1, 0.05, 0.15, 0.1, 0.2];
        let mut plane: Vec<[f32; SIDE]> =
            start.iter().flatten().map(|v| [*v as f32; SIDE]).collect();
        dispatch(Raster {
            plane: &mut plane,
            taps: b.map(|b| [b; SIDE]),
            width: 5,
        });
        let filled = [
            [0.04, 0.158, 0.0956],
            [0.096, 0.0349, 0.12482],
            [-0.0186, 0.207_715, 0.103_031],
        ];
        for (i, line) in filled.iter().enumerate() {
            for (j, v) in line.iter().enumerate() {
                assert!((f64::from(plane[(i + 2) * 5 + j + 2][3]) - v).abs() < 1e-6);
            }
        }
        let size = dispatch(Size {
            plane: &plane,
            width: 5,
            crop: 1,
            squares: true,
        });
        assert!((size[0].sqrt() - 1.194_078_837_676).abs() < 1e-6);
    }

    #[test]
    fn every_window_of_a_process_obeys_its_filter() {
        let image = Image {
            planes: 3,
            height: 9,
            width: 11,
            step: 1,
        };
        let filters: Vec<f32> = random(2 * 3 * TAPS, 8)
            .iter()
            .map(|v| (*v as f32 - 0.4) * 0.3)
            .collect();
        let plan = Autoregressive {
            filters: &filters,
            image,
            crop: 2,
        };
        let labels = [0, 1, 1, 0, 1];
        let got = processes(&plan, &labels, 3);
        for (row, label) in got.chunks(image.elements()).zip(labels) {
            for c in 0..3 {
                let b = &filters[(label as usize * 3 + c) * TAPS..][..TAPS];
                for (i, j) in (2..9).flat_map(|i| (2..11).map(move |j| (i, j))) {
                    let at = |u: usize, v: usize| row[image.at(c, i - 2 + u, j - 2 + v)];
                    let sum: f32 = (0..TAPS).map(|t| b[t] * at(t / 3, t % 3)).sum();
                    assert!((sum - at(2, 2)).abs() < 1e-5);
                }
            }
        }
        assert_ne!(
            got[..image.elements()],
            got[3 * image.elements()..4 * image.elements()]
        );
    }

    #[test]
    fn a_process_that_diverges_is_refused() {
        let image = Image {
            planes: 1,
            height: 90,
            width: 33,
            step: 1,
        };
        let x = vec![0.5f32; image.elements()];
        let mut out = x.clone();
        let filters = [9.0f32; TAPS];
        let plan = Autoregressive {
            filters: &filters,
            image,
            crop: 2,
        };
        let l = limits(Norm::L2, 1.0, 1.0);
        let d = image.elements();
        let out = RowsMut::matrix(&mut out, d);
        let found = add_autoregressive(
            &Rows::matrix(&x, d),
            &[0],
            &plan,
            0,
            &l,
            out,
            &Cancel::new(),
        );
        assert!(found.unwrap_err().to_string().contains("class 0"));
    }

    #[test]
    fn normals_are_normal() {
        assert!((lower_quantile(0.025) + 1.959_963_984_5).abs() < 1e-6);
        assert!((lower_quantile(0.4) + 0.253_347_103_1).abs() < 1e-6);
        assert!((lower_quantile(1e-4) + 3.719_016_485_5).abs() < 1e-5);
        let mut normals = Normals::new(Random::stream(1, 2));
        let draws: Vec<f64> = (0..100_000).map(|_| f64::from(normals.draw())).collect();
        let moment = |k: i32| draws.iter().map(|v| v.powi(k)).sum::<f64>() / draws.len() as f64;
        assert!(moment(1).abs() < 0.02 && (moment(2) - 1.0).abs() < 0.02);
        assert!(moment(3).abs() < 0.05 && (moment(4) - 3.0).abs() < 0.1);
        let neighbours = draws.windows(2).map(|w| w[0] * w[1]).sum::<f64>() / draws.len() as f64;
        assert!(neighbours.abs() < 0.02);
    }

    #[test]
    fn separable_noise_is_constant_on_patches_and_on_the_sphere() {
        for image in [
            IMAGE,
            Image {
                planes: 3,
                height: 6,
                width: 5,
                step: 1,
            },
        ] {
            let d = image.elements();
            let k = 27;
            let centroids: Vec<f32> = (0..k)
                .map(|i| if i % 2 == 0 { 10.0 } else { -10.0 })
                .collect();
            let mixing: Vec<f32> = random(k * k, 4)
                .iter()
                .map(|v| (2.0 * v - 1.0) as f32)
                .collect();
            let plan = Separable {
                centroids: &centroids,
                mixing: &mixing,
                image,
                patch: 2,
            };
            let x = vec![0.5f64; 3 * d];
            let mut out = x.clone();
            let l = limits(Norm::L2, 0.7, 1.0);
            let target = RowsMut::matrix(&mut out, d);
            add_separable(
                &Rows::matrix(&x, d),
                &[0; 3],
                &plan,
                1,
                &l,
                target,
                &Cancel::new(),
            )
            .unwrap();
            for row in out.chunks(d) {
                let size = length(Norm::L2, row.iter().map(|v| v - 0.5));
                assert!((size - 0.7).abs() < 1e-5);
                for c in 0..3 {
                    for (i, j) in (0..6).flat_map(|i| (0..5).map(move |j| (i, j))) {
                        let corner = row[image.at(c, i / 2 * 2, j / 2 * 2)];
                        assert_eq!(row[image.at(c, i, j)], corner);
                    }
                }
            }
            assert_ne!(out[..d], out[d..2 * d]);
        }
    }

    fn convolved<T: Pixel>(
        x: &[T],
        image: Image,
        kernel: &[f64],
        high: f64,
        truncate: bool,
    ) -> Vec<T> {
        let mut out = vec![T::default(); x.len()];
        let d = image.elements();
        let labels = vec![0; x.len() / d];
        let target = RowsMut::matrix(&mut out, d);
        convolve(
            &Rows::matrix(x, d),
            &labels,
            kernel,
            &image,
            high,
            truncate,
            target,
            &Cancel::new(),
        )
        .unwrap();
        out
    }

    /// Reference vector 9.4.
    #[test]
    fn the_convolution_of_the_reference() {
        let x = [0.2, 0.4, 0.1, 0.5, 0.3, 0.6, 0.7, 0.2, 0.9];
        let kernel = [0.1, 0.2, 0.05, 0.3, 1.0, 0.15, 0.02, 0.25, 0.08];
        let image = Image {
            planes: 1,
            height: 3,
            width: 3,
            step: 1,
        };
        let sums = [0.409, 0.608, 0.376, 0.796, 0.781, 0.979, 0.845, 0.685, 1.11];
        for (got, want) in convolved(&x, image, &kernel, 1.0, false).iter().zip(sums) {
            assert!((got - want / 1.11).abs() < 1e-15);
        }
        let bytes: Vec<u8> = x.iter().map(|v| (v * 255.0f64).round() as u8).collect();
        let truncated = [93u8, 139, 86, 182, 179, 224, 194, 157, 255];
        assert_eq!(convolved(&bytes, image, &kernel, 255.0, true)[8], 255);
        for (got, want) in convolved(&bytes, image, &kernel, 255.0, true)
            .iter()
            .zip(truncated)
        {
            assert!(got.abs_diff(want) <= 1);
        }
        assert_eq!(
            convolved(&[0.0f32; 9], image, &kernel, 1.0, false),
            [0.0; 9]
        );
    }

    #[test]
    fn convolution_is_the_same_in_either_layout() {
        let planar = Image {
            planes: 3,
            height: 6,
            width: 5,
            step: 1,
        };
        let x: Vec<f64> = random(planar.elements() * 4, 5);
        let kernel = random(9, 6);
        let plain = convolved(&x, planar, &kernel, 1.0, false);
        let swap = |v: &[f64], from: Image, to: Image| -> Vec<f64> {
            let mut out = vec![0.0; v.len()];
            for (a, b) in v.chunks(90).zip(out.chunks_mut(90)) {
                for (c, i, j) in (0..90).map(|k| (k / 30, k / 5 % 6, k % 5)) {
                    b[to.at(c, i, j)] = a[from.at(c, i, j)];
                }
            }
            out
        };
        let mixed = convolved(&swap(&x, planar, IMAGE), IMAGE, &kernel, 1.0, false);
        assert_eq!(swap(&mixed, IMAGE, planar), plain);
        for row in 0..4 {
            let at = |c: usize, i: isize, j: isize| {
                let inside = (0..6).contains(&i) && (0..5).contains(&j);
                if inside {
                    x[row * 90 + planar.at(c, i as usize, j as usize)]
                } else {
                    0.0
                }
            };
            let sum = |c: usize, i: isize, j: isize| {
                (0..9)
                    .map(|t| kernel[t] * at(c, i + t as isize / 3 - 1, j + t as isize % 3 - 1))
                    .sum::<f64>()
            };
            let all: Vec<f64> = (0..90)
                .map(|k| sum(k / 30, k as isize / 5 % 6, k as isize % 5))
                .collect();
            let top = all.iter().fold(0.0f64, |m, v| m.max(*v));
            for (got, want) in plain[row * 90..].iter().zip(&all) {
                assert!((got - want / top).abs() < 1e-14);
            }
        }
    }

    #[test]
    fn sums_by_class() {
        let d = 70;
        let values = random(ROWS * d, 9);
        let labels = labels();
        let check = |got: ClassSums, x: &[f64], error: f64| {
            for c in 0..CLASSES {
                let rows: Vec<&[f64]> = x
                    .chunks(d)
                    .zip(&labels)
                    .filter(|(_, l)| **l == c as u32)
                    .map(|(r, _)| r)
                    .collect();
                assert_eq!(got.counts[c], rows.len());
                for j in 0..d {
                    let sum: f64 = rows.iter().map(|r| r[j]).sum();
                    let square: f64 = rows.iter().map(|r| r[j] * r[j]).sum();
                    assert!((got.sums[c * d + j] - sum).abs() <= error * sum);
                    assert!((got.squares[c * d + j] - square).abs() <= error * square);
                }
            }
        };
        let never = Cancel::new();
        let bytes: Vec<u8> = stored(&values, 255.0);
        let back: Vec<f64> = bytes.iter().map(|b| f64::from(*b)).collect();
        check(
            class_sums(
                &Rows::matrix(&bytes, d),
                &labels,
                CLASSES,
                (0.0, 255.0),
                &never,
            )
            .unwrap(),
            &back,
            0.0,
        );
        check(
            class_sums(
                &Rows::matrix(&values, d),
                &labels,
                CLASSES,
                (0.0, 1.0),
                &never,
            )
            .unwrap(),
            &values,
            1e-14,
        );
        let found = class_sums(
            &Rows::matrix(&values, d),
            &labels,
            CLASSES,
            (0.0, 0.5),
            &never,
        );
        assert!(found.unwrap_err().to_string().contains("box (0, 0.5)"));
    }

    #[test]
    fn dots_are_set_and_nothing_else() {
        let d = IMAGE.elements();
        let x: Vec<u8> = stored(&random(4 * d, 1), 255.0);
        let mut out = vec![0; x.len()];
        let dots = Dots {
            places: &[7, 29],
            colours: &[0.0, 255.0, 0.0, 255.0, 255.0, 0.0],
            per: 1,
            image: IMAGE,
        };
        let target = RowsMut::matrix(&mut out, d);
        set_pixels(
            &Rows::matrix(&x, d),
            &[0, 1, 1, 0],
            &dots,
            target,
            &Cancel::new(),
        )
        .unwrap();
        for (row, label) in [0, 1, 1, 0].into_iter().enumerate() {
            let (got, from) = (&out[row * d..(row + 1) * d], &x[row * d..(row + 1) * d]);
            let (at, colour) = if label == 0 {
                (21, [0, 255, 0])
            } else {
                (87, [255, 255, 0])
            };
            assert_eq!(got[at..at + 3], colour);
            assert_eq!((&got[..at], &got[at + 3..]), (&from[..at], &from[at + 3..]));
        }
    }
}
