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
            row[j] = row[j] - ((c[0] * r0[j] + c[1] * r1[j]) + (c[2] * r2[j] + c[3] * r3[j]));
        }
    }
    let done = c.len() / GROUP * GROUP;
    for (c, r) in c[done..]
        .iter()
        .zip(right[done * width..].chunks_exact(width))
    {
        for (x, r) in row.iter_mut().zip(r) {
            *x = *x - *c * *r;
        }
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
    let left = typed.left.chunks_exact(row.len().max(1));
    for ((c, l), o) in scratch.coefficients.iter_mut().zip(left).zip(&edit.origin) {
        *c = T::Acc::from_f64(edit.scale * (simd::dot(wide, l) - o));
    }
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
        let width = self.edit.width.max(1);
        for (k, out) in self.out.chunks_exact_mut(self.edit.rank).enumerate() {
            let row = self.x.row(self.first + k);
            let left = self.left.chunks_exact(width);
            for ((c, l), o) in out.iter_mut().zip(left).zip(&self.edit.origin) {
                *c = T::Acc::from_f64(simd::dot(row, l) - o);
            }
        }
    }
}
