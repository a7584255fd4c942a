//! The edit of rows that ablation, affine ablation, steering and erasure are all cases of:
//!
//! `y = x − λ Σ_i (x·l_i − o_i) r_i + s`, then optionally rescaled to the length of `x`.
//!
//! A row is read and written once; both sweeps over it (products, update) happen while it is in the cache. Half and
//! single precision compute in f32 with coefficients totalled in f64 ([`simd::dot`]) and round once, at the store.

use crate::element::{Element, Real};
use crate::simd::{self, Kernel, dispatch};
use crate::view::{Rows, RowsMut, Run};
use crate::{Error, Result, par};
use std::sync::OnceLock;

/// A row shorter than this part of its old length is not stretched back: what is left of it is rounding.
pub const VANISHED: f64 = 1e-6;

/// Right-hand vectors subtracted in one sweep of a row.
const GROUP: usize = 4;

/// The arithmetic type as an element, with the place where an [`Edit`] keeps its vectors in that type.
pub trait Arithmetic: Real + Element<Acc = Self> {
    fn typed(edit: &Edit) -> &Typed<Self>;
}

impl Arithmetic for f32 {
    fn typed(edit: &Edit) -> &Typed<Self> {
        edit.single.get_or_init(|| Typed::of(edit))
    }
}

impl Arithmetic for f64 {
    fn typed(edit: &Edit) -> &Typed<Self> {
        edit.double.get_or_init(|| Typed::of(edit))
    }
}

/// The vectors of an [`Edit`] in the arithmetic type.
#[derive(Debug, Clone)]
pub struct Typed<A> {
    left: Vec<A>,
    right: Option<Vec<A>>,
    shift: Option<Vec<A>>,
}

impl<A: Real> Typed<A> {
    fn of(edit: &Edit) -> Self {
        let cast = |v: &Vec<f64>| v.iter().map(|x| A::from_f64(*x)).collect::<Vec<A>>();
        Self {
            left: cast(&edit.left),
            right: edit.right.as_ref().map(cast),
            shift: edit.shift.as_ref().map(cast),
        }
    }

    fn right(&self) -> &[A] {
        self.right.as_deref().unwrap_or(&self.left)
    }
}

/// What is done to every row; see the module's formula.
#[derive(Debug, Default)]
pub struct Edit {
    width: usize,
    rank: usize,
    left: Vec<f64>,
    right: Option<Vec<f64>>,
    origin: Vec<f64>,
    shift: Option<Vec<f64>>,
    scale: f64,
    keep_norm: bool,
    single: OnceLock<Typed<f32>>,
    double: OnceLock<Typed<f64>>,
}

impl Edit {
    /// Leaves rows of `width` elements as they are.
    pub fn new(width: usize) -> Self {
        Self {
            width,
            scale: 1.0,
            ..Self::default()
        }
    }

    /// Removes the components along orthonormal `rows` (`rank × width`).
    #[must_use]
    pub fn along(mut self, rows: Vec<f64>) -> Self {
        debug_assert!(rows.len().is_multiple_of(self.width.max(1)));
        self.rank = rows.len() / self.width.max(1);
        self.origin = vec![0.0; self.rank];
        self.left = rows;
        self
    }

    /// Subtracts multiples of these vectors instead of the ones that measure the coefficients.
    #[must_use]
    pub fn onto(mut self, right: Vec<f64>) -> Self {
        debug_assert_eq!(right.len(), self.left.len());
        self.right = Some(right);
        self
    }

    /// Measures the coefficients from `origin` (`width` elements) instead of from zero.
    #[must_use]
    pub fn from_origin(mut self, origin: &[f64]) -> Self {
        self.origin = (self.left.chunks_exact(self.width.max(1)))
            .map(|l| l.iter().zip(origin).map(|(a, b)| a * b).sum())
            .collect();
        self
    }

    /// λ of the formula.
    #[must_use]
    pub fn scaled(mut self, scale: f64) -> Self {
        self.scale = scale;
        self
    }

    /// Adds `shift` (`width` elements) to every row.
    #[must_use]
    pub fn shifted(mut self, shift: Vec<f64>) -> Self {
        self.shift = Some(shift);
        self
    }

    /// Rescales every edited row to the length it had, unless less than [`VANISHED`] of it is left.
    #[must_use]
    pub fn keeping_norm(mut self, keep: bool) -> Self {
        self.keep_norm = keep;
        self
    }

    /// Length of the rows.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of coefficients.
    pub fn rank(&self) -> usize {
        self.rank
    }

    fn check(&self, arg: &'static str, width: usize) -> Result<()> {
        if width != self.width {
            return Err(Error::shape(
                arg,
                format!("a last axis of {}", self.width),
                width,
            ));
        }
        Ok(())
    }

    /// Edits `x` in place. A row with a NaN or an infinity comes out non-finite; no other row is affected.
    pub fn apply<T: Element<Acc: Arithmetic>>(&self, x: RowsMut<'_, T>) -> Result<()> {
        self.check("x", x.width())?;
        self.run(None, x);
        Ok(())
    }

    /// Writes the edited rows of `x` to `out`.
    pub fn apply_to<T: Element<Acc: Arithmetic>>(
        &self,
        x: &Rows<'_, T>,
        out: RowsMut<'_, T>,
    ) -> Result<()> {
        self.check("x", x.width())?;
        if (out.rows(), out.width()) != (x.rows(), x.width()) {
            return Err(Error::shape(
                "out",
                format!("{} rows of {}", x.rows(), x.width()),
                format!("{} rows of {}", out.rows(), out.width()),
            ));
        }
        self.run(Some(x), out);
        Ok(())
    }

    fn run<T: Element<Acc: Arithmetic>>(&self, from: Option<&Rows<'_, T>>, to: RowsMut<'_, T>) {
        let row_bytes = self.width * size_of::<T>();
        let bytes = to.rows() * row_bytes * self.rank.max(1);
        let typed = T::Acc::typed(self);
        let runs = to.into_runs((par::ITEM_BYTES / row_bytes.max(1)).max(1));
        par::for_each(bytes, runs, |run| {
            dispatch(EditRun {
                edit: self,
                typed,
                from,
                run,
            });
        });
    }

    /// `x·l_i − o_i` of every row and vector: `out` is `rows × rank`.
    pub fn coefficients<T: Element<Acc: Arithmetic>>(
        &self,
        x: &Rows<'_, T>,
        out: &mut [T::Acc],
    ) -> Result<()> {
        self.check("x", x.width())?;
        if out.len() != x.rows() * self.rank {
            return Err(Error::shape(
                "out",
                format!("{} elements", x.rows() * self.rank),
                out.len(),
            ));
        }
        if out.is_empty() {
            return Ok(());
        }
        let row_bytes = self.width * size_of::<T>();
        let step = (par::ITEM_BYTES / row_bytes.max(1)).max(1);
        let typed = T::Acc::typed(self);
        let items = out.chunks_mut(step * self.rank).enumerate().collect();
        par::for_each(x.rows() * row_bytes * self.rank, items, |(i, out)| {
            dispatch(Coefficients {
                edit: self,
                left: &typed.left,
                x,
                first: i * step,
                out,
            });
        });
        Ok(())
    }
}

struct EditRun<'a, T: Element> {
    edit: &'a Edit,
    typed: &'a Typed<T::Acc>,
    from: Option<&'a Rows<'a, T>>,
    run: Run<&'a mut [T]>,
}

impl<T: Element<Acc: Arithmetic>> Kernel for EditRun<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let (edit, typed, width) = (self.edit, self.typed, self.edit.width);
        let mut scratch = Scratch::new(edit, width);
        for (k, row) in self.run.data.chunks_exact_mut(width).enumerate() {
            if let Some(from) = self.from {
                row.copy_from_slice(from.row(self.run.first + k));
            }
            if edit.keep_norm {
                edit_in_scratch(edit, typed, row, &mut scratch);
                continue;
            }
            match (edit.rank, &typed.shift) {
                (0, Some(shift)) => add(row, shift),
                (1, None) => {
                    let c = edit.scale * (simd::dot(row, &typed.left) - edit.origin[0]);
                    subtract(row, T::Acc::from_f64(c), typed.right());
                }
                _ => edit_in_scratch(edit, typed, row, &mut scratch),
            }
        }
    }
}

/// Room for one row and its coefficients in the arithmetic type.
struct Scratch<A> {
    row: Vec<A>,
    coefficients: Vec<A>,
}

impl<A: Real> Scratch<A> {
    fn new(edit: &Edit, width: usize) -> Self {
        let direct = !edit.keep_norm && edit.rank + usize::from(edit.shift.is_some()) <= 1;
        Self {
            row: vec![A::ZERO; if direct { 0 } else { width }],
            coefficients: vec![A::ZERO; edit.rank],
        }
    }
}

#[inline(always)]
fn add<T: Element>(row: &mut [T], shift: &[T::Acc]) {
    for (x, s) in row.iter_mut().zip(shift) {
        *x = T::store(x.load() + *s);
    }
}

#[inline(always)]
fn subtract<T: Element>(row: &mut [T], c: T::Acc, right: &[T::Acc]) {
    for (x, r) in row.iter_mut().zip(right) {
        *x = T::store(x.load() - c * *r);
    }
}

/// Subtracts `Σ_i c_i r_i`, [`GROUP`] vectors per sweep.
#[inline(always)]
fn subtract_all<A: Real>(row: &mut [A], c: &[A], right: &[A]) {
    let width = row.len();
    let mut groups = c.chunks_exact(GROUP);
    let mut vectors = right.chunks_exact(GROUP * width);
    for (c, r) in (&mut groups).zip(&mut vectors) {
        let (r0, rest) = r.split_at(width);
        let (r1, rest) = rest.split_at(width);
        let (r2, r3) = rest.split_at(width);
        let r3 = &r3[..width];
        for j in 0..width {
            row[j] -= (c[0] * r0[j] + c[1] * r1[j]) + (c[2] * r2[j] + c[3] * r3[j]);
        }
    }
    let done = c.len() / GROUP * GROUP;
    for (c, r) in c[done..]
        .iter()
        .zip(right[done * width..].chunks_exact(width))
    {
        for (x, r) in row.iter_mut().zip(r) {
            *x -= *c * *r;
        }
    }
}

/// `scale (x·l_i − o_i)` of every vector, [`GROUP`] of them per sweep of the row.
#[inline(always)]
fn measure<T: Element>(edit: &Edit, left: &[T::Acc], scale: f64, row: &[T], out: &mut [T::Acc]) {
    let width = row.len();
    let at = |i: usize, dot: f64| T::Acc::from_f64(scale * (dot - edit.origin[i]));
    let mut i = 0;
    while i + GROUP <= out.len() {
        let l = |k: usize| &left[(i + k) * width..(i + k + 1) * width];
        let found = simd::dots(row, [l(0), l(1), l(2), l(3)]);
        for k in 0..GROUP {
            out[i + k] = at(i + k, found[k]);
        }
        i += GROUP;
    }
    while i < out.len() {
        out[i] = at(i, simd::dot(row, &left[i * width..(i + 1) * width]));
        i += 1;
    }
}

#[inline(always)]
fn edit_in_scratch<T: Element<Acc: Arithmetic>>(
    edit: &Edit,
    typed: &Typed<T::Acc>,
    row: &mut [T],
    scratch: &mut Scratch<T::Acc>,
) {
    let wide = &mut scratch.row[..row.len()];
    for (w, x) in wide.iter_mut().zip(row.iter()) {
        *w = x.load();
    }
    let before = if edit.keep_norm {
        simd::sum_squares_f64(wide)
    } else {
        0.0
    };
    measure(
        edit,
        &typed.left,
        edit.scale,
        wide,
        &mut scratch.coefficients,
    );
    subtract_all(wide, &scratch.coefficients, typed.right());
    if let Some(shift) = &typed.shift {
        add(wide, shift);
    }
    let mut factor = T::Acc::ONE;
    if edit.keep_norm {
        factor = T::Acc::from_f64(restoring_factor(before, simd::sum_squares_f64(wide)));
    }
    for (x, w) in row.iter_mut().zip(wide.iter()) {
        *x = T::store(*w * factor);
    }
}

/// What a vector of squared length `after` is multiplied by to have squared length `before`.
#[inline(always)]
pub(super) fn restoring_factor(before: f64, after: f64) -> f64 {
    if after > VANISHED * VANISHED * before {
        (before / after).sqrt()
    } else {
        1.0
    }
}

struct Coefficients<'a, T: Element> {
    edit: &'a Edit,
    left: &'a [T::Acc],
    x: &'a Rows<'a, T>,
    first: usize,
    out: &'a mut [T::Acc],
}

impl<T: Element<Acc: Arithmetic>> Kernel for Coefficients<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for (k, out) in self.out.chunks_exact_mut(self.edit.rank).enumerate() {
            let row = self.x.row(self.first + k);
            measure(self.edit, self.left, 1.0, row, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::for_each_level;
    use half::{bf16, f16};
    use proptest::prelude::*;

    const X: [f64; 12] = [
        1.0, 2.0, -1.0, 0.5, 0.0, 0.0, 0.0, 0.0, -2.0, 0.25, 3.0, 1.0,
    ];
    const D: [f64; 4] = [4.0 / 3.0, -0.75, -1.0 / 12.0, 2.25];

    fn unit(v: &[f64]) -> Vec<f64> {
        let n = v.iter().map(|x| x * x).sum::<f64>().sqrt();
        v.iter().map(|x| x / n).collect()
    }

    fn edited(edit: &Edit) -> Vec<f64> {
        let mut x = X;
        edit.apply(RowsMut::matrix(&mut x, 4)).unwrap();
        x.to_vec()
    }

    fn close(got: &[f64], want: &[f64]) {
        assert_eq!(got.len(), want.len());
        for (g, w) in got.iter().zip(want) {
            assert!((g - w).abs() < 2e-14, "{got:?} {want:?}");
        }
    }

    #[test]
    fn one_direction() {
        let r = || Edit::new(4).along(unit(&D));
        let mut c = [0.0; 3];
        r().coefficients(&Rows::matrix(&X, 4), &mut c).unwrap();
        close(&c, &[0.382672984326642, 0.0, -0.313791847147846]);
        let want = [
            0.812558575445173,
            2.10543580131209,
            -0.988284910965323,
            0.18369259606373,
            0.0,
            0.0,
            0.0,
            0.0,
            -1.84629803186504,
            0.163542642924086,
            2.99039362699156,
            1.25937207122774,
        ];
        close(&edited(&r()), &want);
        let want = [
            0.822248383364336,
            2.13054324478429,
            -1.00007026557981,
            0.185883140875905,
            0.0,
            0.0,
            0.0,
            0.0,
            -1.85279604566793,
            0.164118228410687,
            3.00091826533753,
            1.26380440932298,
        ];
        close(&edited(&r().keeping_norm(true)), &want);
        let half = edited(&r().scaled(0.5));
        close(
            &half[..4],
            &[
                0.906279287722587,
                2.05271790065604,
                -0.994142455482662,
                0.341846298031865,
            ],
        );
        let twice = edited(&r().scaled(2.0));
        let length = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>();
        assert!((length(&twice) - length(&X)).abs() < 1e-13);
    }

    #[test]
    fn origin_and_shift() {
        let low = [0.25, 0.5, 0.375, -0.25];
        let r = || Edit::new(4).along(unit(&D)).from_origin(&low);
        let want = [
            0.698219306466729,
            2.16975164011247,
            -0.981138706654171,
            -0.00925492033739439,
            -0.114339268978444,
            0.0643158388003749,
            0.00714620431115276,
            -0.192947516401125,
            -1.96063730084349,
            0.227858481724461,
            2.99753983130272,
            1.06642455482662,
        ];
        close(&edited(&r()), &want);
        let acting = edited(&r().shifted(D.to_vec()));
        close(
            &acting[..4],
            &[
                2.03155263980006,
                1.41975164011247,
                -1.0644720399875,
                2.24074507966261,
            ],
        );
        let steered = edited(&Edit::new(4).shifted(unit(&D).iter().map(|r| 1.5 * r).collect()));
        close(
            &steered[..4],
            &[
                1.73473212990715,
                1.58671317692723,
                -1.0459207581192,
                1.73986046921832,
            ],
        );
    }

    #[test]
    fn two_directions_at_once() {
        let q = crate::linalg::orthonormalize("q", &[1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0], 2, 4)
            .unwrap();
        let y = edited(&Edit::new(4).along(q.rows));
        close(&y[..4], &[0.0, 0.0, 0.0, 0.5]);
        close(&y[8..], &[-1.75, 1.75, 1.75, 1.0]);
    }

    #[test]
    fn rounds_once_to_bf16() {
        let x = [
            0x3ba1, 0x3f99, 0xbf8c, 0xc064, 0xbfe9, 0xc07e, 0x3e76, 0x40ac,
        ]
        .map(bf16::from_bits);
        let r = [
            0xbea4312du32,
            0xbecefaf8,
            0x3ea36742,
            0x3e6e1a7a,
            0x3d8ca86e,
            0xbf1b31cc,
            0xbc9c207e,
            0x3ee7f11d,
        ];
        let want = [
            0x3f7c, 0x401b, 0xc004, 0xc089, 0xc002, 0xc008, 0x3e99, 0x4080,
        ]
        .map(bf16::from_bits);
        let edit = Edit::new(8).along(r.iter().map(|b| f64::from(f32::from_bits(*b))).collect());
        let mut y = x;
        edit.apply(RowsMut::matrix(&mut y, 8)).unwrap();
        assert_eq!(y, want);
        let mut x = [1.5, -2.25, 0.3125, 7.0].map(bf16::from_f64);
        let q = [0.5, 0.5, 0.5, 0.5, 0.5, -0.5, 0.5, -0.5].to_vec();
        Edit::new(4)
            .along(q)
            .apply(RowsMut::matrix(&mut x, 4))
            .unwrap();
        assert_eq!(x, [0.59375, -4.625, -0.59375, 4.625].map(bf16::from_f64));
    }

    #[test]
    fn an_oblique_edit_leaves_nothing_where_it_looks() {
        let (left, right) = (vec![0.0, 2.0, 0.0, 1.0], vec![0.3, 0.5, -1.0, 0.0]);
        let dot: f64 = left.iter().zip(&right).map(|(a, b)| a * b).sum();
        let scaled = right.iter().map(|v| v / dot).collect();
        let y = edited(&Edit::new(4).along(left.clone()).onto(scaled));
        for row in y.chunks(4) {
            assert!(row.iter().zip(&left).map(|(a, b)| a * b).sum::<f64>().abs() < 1e-14);
        }
    }

    #[test]
    fn refuses_other_widths_and_stays_in_its_row() {
        let edit = Edit::new(4).along(unit(&D));
        let mut x = [0.0f32; 6];
        assert!(edit.apply(RowsMut::matrix(&mut x, 3)).is_err());
        assert!(
            edit.coefficients(&Rows::matrix(&X, 4), &mut [0.0; 2])
                .is_err()
        );
        let mut x = X;
        x[5] = f64::NAN;
        edit.apply(RowsMut::matrix(&mut x, 4)).unwrap();
        let clean = edited(&edit);
        assert_eq!((&x[..4], &x[8..]), (&clean[..4], &clean[8..]));
        assert!(x[4..8].iter().all(|v| v.is_nan()));
    }

    fn check<T: Element<Acc: Arithmetic> + PartialEq>(
        values: &[f32],
        width: usize,
        q: &[f64],
        unit_roundoff: f64,
    ) {
        let rank = q.len() / width;
        let x: Vec<T> = values
            .iter()
            .map(|v| T::store(<T::Acc as Real>::from_f64(f64::from(*v))))
            .collect();
        let edit = Edit::new(width).along(q.to_vec());
        let mut seen: Option<Vec<T>> = None;
        for_each_level(|_| {
            let mut y = x.clone();
            edit.apply(RowsMut::matrix(&mut y, width)).unwrap();
            let mut out = vec![T::default(); x.len()];
            edit.apply_to(&Rows::matrix(&x, width), RowsMut::matrix(&mut out, width))
                .unwrap();
            assert_eq!(out, y);
            assert_eq!(seen.get_or_insert_with(|| y.clone()), &y);
        });
        let wide = |v: &T| v.load().to_f64();
        let y = seen.unwrap();
        for (x, y) in x.chunks(width).zip(y.chunks(width)) {
            for r in q.chunks(width) {
                let c: f64 = y.iter().zip(r).map(|(v, r)| wide(v) * r).sum();
                let stored: f64 = y.iter().zip(r).map(|(v, r)| (wide(v) * r).abs()).sum();
                let computed: f64 = q
                    .chunks(width)
                    .map(|r| {
                        x.iter()
                            .zip(r)
                            .map(|(v, r)| (wide(v) * r).abs())
                            .sum::<f64>()
                    })
                    .sum();
                let acc = if T::DTYPE.size() == 8 {
                    2f64.powi(-53)
                } else {
                    2f64.powi(-24)
                };
                let bound = unit_roundoff * stored
                    + (32 + 2 * rank) as f64 * acc * computed
                    + 1e-7 * (width as f64) * acc;
                assert!(
                    c.abs() <= bound + width as f64 * 6e-8 * unit_roundoff,
                    "{c} {bound}"
                );
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn what_is_left_is_rounding(
            width in 24usize..400,
            rank in 1usize..24,
            values in prop::collection::vec(-8.0f32..8.0, 400 * 3),
            seed in prop::collection::vec(-1.0f64..1.0, 400 * 24),
        ) {
            let q = crate::linalg::orthonormalize("q", &seed[..rank * width], rank, width).unwrap();
            let values = &values[..3 * width];
            check::<f64>(values, width, &q.rows, 2f64.powi(-53));
            check::<f32>(values, width, &q.rows, 2f64.powi(-24));
            check::<f16>(values, width, &q.rows, 2f64.powi(-11));
            check::<bf16>(values, width, &q.rows, 2f64.powi(-8));
        }
    }
}
