//! What can be done to one stored tensor, a tile at a time, by the kernels of the wings; and what undoes it up to rounding.

use super::files::Named;
use super::header::{TensorInfo, header_of};
use crate::element::{DType, Element, Real};
use crate::forget::dampen::{Mode, RuleSpec, Selection, dampen};
use crate::linalg::Orthonormal;
use crate::refuse::directions::edit::Arithmetic;
use crate::refuse::directions::{ByTile, Edit, Factors, NormPreserving, check_finite};
use crate::simd::{self, Kernel, dispatch};
use crate::view::{Rows, RowsMut};
use crate::{Error, Result, with_dtype};
use bytemuck::Pod;
use serde_json::{Value, json};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// An element type whose tiles are read and written as bytes.
pub trait Editable: Element<Acc: Arithmetic + Pod> + Pod {}
impl<T: Element<Acc: Arithmetic + Pod> + Pod> Editable for T {}

/// Importances of one tensor: a part of a safetensors file.
#[derive(Debug, Clone)]
pub struct Importance {
    file: Arc<Named>,
    dtype: DType,
    begin: u64,
}

impl Importance {
    /// The tensors of an importance file, ready to be looked up.
    ///
    /// # Errors
    /// `Checkpoint` if it is no sound safetensors file.
    pub fn open(path: &Path) -> Result<(Arc<Named>, Vec<TensorInfo>)> {
        let file = Named::open(path)?;
        let header = header_of(&file)?;
        Ok((Arc::new(file), header.tensors))
    }

    /// `count` elements from `offset` on of one of them.
    ///
    /// # Errors
    /// `DType` unless it is float32 or float64; `Shape` if it has fewer elements.
    pub fn part(file: &Arc<Named>, tensor: &TensorInfo, offset: u64, count: u64) -> Result<Self> {
        let dtype = (tensor.editable())
            .filter(|d| matches!(d, DType::F32 | DType::F64))
            .ok_or_else(|| Error::DType {
                arg: "importance",
                expected: "float32 or float64".into(),
                found: format!("{} ({})", tensor.dtype, tensor.name),
            })?;
        let size = dtype.size() as u64;
        let (last, have) = (offset.saturating_add(count), tensor.bytes() / size);
        if last > have {
            let found = format!("{have} ({})", tensor.name);
            return Err(Error::shape(
                "importance",
                format!("{last} elements"),
                found,
            ));
        }
        Ok(Self {
            file: file.clone(),
            dtype,
            begin: tensor.begin + offset * size,
        })
    }

    fn read<I: Pod + Default>(&self, first: u64, count: usize) -> Result<Vec<I>> {
        let mut out = vec![I::default(); count];
        let at = self.begin + first * size_of::<I>() as u64;
        self.file.read_at(at, bytemuck::cast_slice_mut(&mut out))?;
        Ok(out)
    }
}

/// A part of a tensor that several were fused into: of every `cycle` elements, in contiguous order, those from `from` to
/// before `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    pub cycle: usize,
    pub from: usize,
    pub to: usize,
}

impl Part {
    /// What of the `len` elements from `first` on belongs to it, counted from `first`.
    fn runs(self, first: usize, len: usize) -> impl Iterator<Item = Range<usize>> {
        let (end, mut base) = (first + len, first / self.cycle * self.cycle);
        std::iter::from_fn(move || {
            while base < end {
                let run = (base + self.from).max(first)..(base + self.to).min(end);
                base += self.cycle;
                if run.start < run.end {
                    return Some(run.start - first..run.end - first);
                }
            }
            None
        })
    }

    fn check(self, count: usize, width: usize) -> Result<()> {
        let whole = [self.cycle, self.from, self.to]
            .iter()
            .all(|n| n.is_multiple_of(width));
        if self.from >= self.to
            || self.to > self.cycle
            || !count.is_multiple_of(self.cycle)
            || !whole
        {
            let expected = format!("a part of {count} elements, in rows of {width}");
            return Err(Error::value("part", expected, format!("{self:?}")));
        }
        Ok(())
    }
}

/// The parts of a tile that are edited: all of it where there is no part.
fn runs(part: Option<Part>, first: usize, len: usize) -> impl Iterator<Item = Range<usize>> {
    let all = Part {
        cycle: usize::MAX,
        from: 0,
        to: usize::MAX,
    };
    match part {
        Some(part) => part.runs(first, len),
        None => all.runs(0, len),
    }
}

/// One edit of one tensor.
#[derive(Debug, Clone)]
pub enum Spec {
    /// `W ← W − scale Qᵀ Q W` along the last axis, or along the one before it.
    Ablate {
        last_axis: bool,
        q: Arc<Orthonormal>,
        scale: f64,
        keep: NormPreserving,
        /// Whole rows along the last axis.
        part: Option<Part>,
    },
    Scale {
        factor: f64,
        part: Option<Part>,
    },
    Dampen {
        forget: Importance,
        retain: Importance,
        rule: RuleSpec,
    },
}

/// A tensor as equal matrices, one after another. Element-wise edits see one column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    pub matrices: usize,
    pub rows: usize,
    pub width: usize,
}

impl Grid {
    /// How a tensor of this shape is cut for these edits; checks that they fit it.
    pub fn new(shape: &[u64], specs: &[Spec]) -> Result<Self> {
        let dims: Vec<usize> = shape.iter().map(|d| *d as usize).collect();
        let count = dims.iter().product();
        for spec in specs {
            if let Spec::Scale {
                part: Some(part), ..
            } = spec
            {
                part.check(count, 1)?;
            }
        }
        let ablates = specs.iter().any(|s| matches!(s, Spec::Ablate { .. }));
        if !ablates {
            return Ok(Self {
                matrices: 1,
                rows: count,
                width: 1,
            });
        }
        let (matrices, rows, width) = match dims[..] {
            [d] => (1, 1, d),
            [r, w] => (1, r, w),
            [e, r, w] => (e, r, w),
            _ => {
                let found = format!("{shape:?}");
                return Err(Error::shape("weight", "1, 2 or 3 axes", found));
            }
        };
        for spec in specs {
            if let Spec::Ablate {
                last_axis,
                q,
                keep,
                part,
                ..
            } = spec
            {
                if let Some(part) = part {
                    part.check(count, width)?;
                    if !*last_axis {
                        let expected = "None where the residual axis is not the last";
                        return Err(Error::value("part", expected, format!("{part:?}")));
                    }
                }
                let along = if *last_axis { width } else { rows };
                if along != q.width {
                    let found = format!("{along} in {shape:?}");
                    let expected = format!("a residual axis of {}", q.width);
                    return Err(Error::shape("weight", expected, found));
                }
                let by_row = matches!(keep, NormPreserving::Row | NormPreserving::RowPre);
                if *last_axis && by_row {
                    return Err(Error::value(
                        "norm_preserving",
                        "None or \"in\" where the residual axis is the last (the forms by row need the transpose)",
                        format!("{keep:?}"),
                    ));
                }
                if !*last_axis && dims.len() < 2 {
                    return Err(Error::shape("weight", "2 or 3 axes", format!("{shape:?}")));
                }
            }
        }
        Ok(Self {
            matrices,
            rows,
            width,
        })
    }

    /// Rows of a tile of about `bytes`: a multiple of what the edits need.
    pub fn tile_rows(&self, element: usize, specs: &[Spec], bytes: usize) -> usize {
        let by_column = |s: &Spec| {
            matches!(
                s,
                Spec::Ablate {
                    last_axis: false,
                    ..
                }
            )
        };
        let step = if specs.iter().any(by_column) {
            ByTile::<f32>::STEP
        } else {
            1
        };
        let fit = bytes / (self.width * element).max(1) / step * step;
        fit.clamp(step, self.rows.max(1).next_multiple_of(step))
    }

    /// Bytes of working memory besides tiles.
    pub fn scratch(&self, specs: &[Spec]) -> usize {
        let one = |s: &Spec| match s {
            Spec::Ablate { last_axis, q, .. } if *last_axis => self.rows * (q.rank + 1) * 8,
            Spec::Ablate { q, .. } => (8 * q.rank + 6) * self.width * 8,
            _ => 0,
        };
        specs.iter().map(one).sum()
    }
}

/// What a stage did to a whole tensor.
#[derive(Debug, Clone)]
pub enum Done {
    Ablated {
        rank: usize,
        before: f64,
        after: f64,
        unrestored: u64,
    },
    Scaled(f64),
    Dampened(Selection),
}

impl Done {
    fn of(spec: &Spec) -> Self {
        match spec {
            Spec::Ablate { q, .. } => Self::Ablated {
                rank: q.rank,
                before: 0.0,
                after: 0.0,
                unrestored: 0,
            },
            Spec::Scale { factor, .. } => Self::Scaled(*factor),
            Spec::Dampen { .. } => Self::Dampened(Selection::default()),
        }
    }

    fn add(&mut self, b: f64, a: f64, u: u64) {
        if let Self::Ablated {
            before,
            after,
            unrestored,
            ..
        } = self
        {
            (*before, *after) = (before.hypot(b), after.hypot(a));
            *unrestored += u;
        }
    }

    pub fn to_json(&self) -> Value {
        match self {
            Self::Ablated {
                rank,
                before,
                after,
                unrestored,
            } => {
                json!({"op": "ablate", "rank": rank, "residual_before": before, "residual_after": after,
                    "unrestored": unrestored})
            }
            Self::Scaled(factor) => json!({"op": "scale", "factor": factor}),
            Self::Dampened(s) => {
                json!({"op": "dampen", "selected": s.count, "changed": s.changed, "zeroed": s.zeroed})
            }
        }
    }
}

/// An edit at work on one matrix.
enum Stage<T: Editable> {
    Columns(Box<ByTile<T::Acc>>),
    Rows(Box<RowStage<T::Acc>>),
    Scale(f64, Option<Part>),
    Dampen(Importance, Importance, RuleSpec),
}

struct RowStage<A> {
    edit: Edit,
    part: Option<Part>,
    keep: bool,
    inverse: RowInverse<A>,
    before: f64,
    after: f64,
    unrestored: u64,
}

/// What was subtracted from every row of a matrix.
pub struct RowInverse<A> {
    pub q: Arc<Orthonormal>,
    pub scale: f64,
    /// `rows × rank`; zero for rows that are not edited.
    pub coefficients: Vec<A>,
    /// What every row was divided by where lengths were kept, else empty.
    pub stretched: Vec<A>,
}

/// The edits of one tensor, matrix after matrix.
pub struct Chain<'s, T: Editable> {
    specs: &'s [Spec],
    grid: Grid,
    stages: Vec<Stage<T>>,
    factors: Vec<Option<Arc<Factors<T::Acc>>>>,
    pub done: Vec<Done>,
}

/// Where a tile lies.
#[derive(Debug, Clone, Copy)]
pub struct At {
    pub matrix: usize,
    pub row: usize,
}

impl At {
    fn element(self, grid: Grid) -> usize {
        (self.matrix * grid.rows + self.row) * grid.width
    }
}

impl<'s, T: Editable> Chain<'s, T> {
    pub fn new(specs: &'s [Spec], grid: Grid) -> Self {
        Self {
            specs,
            grid,
            stages: Vec::new(),
            factors: Vec::new(),
            done: specs.iter().map(Done::of).collect(),
        }
    }

    /// Prepares for the next matrix.
    pub fn begin(&mut self) {
        let width = self.grid.width;
        let stage = |spec: &Spec| match spec {
            Spec::Ablate {
                last_axis: false,
                q,
                scale,
                keep,
                ..
            } => Stage::Columns(Box::new(ByTile::new(q.clone(), width, *scale, *keep))),
            Spec::Ablate {
                q,
                scale,
                keep,
                part,
                ..
            } => {
                let keep = *keep == NormPreserving::In;
                let edit = Edit::new(width).along(q.rows.clone());
                Stage::Rows(Box::new(RowStage {
                    edit: edit.scaled(*scale).keeping_norm(keep),
                    part: *part,
                    keep,
                    inverse: RowInverse {
                        q: q.clone(),
                        scale: *scale,
                        coefficients: Vec::new(),
                        stretched: Vec::new(),
                    },
                    before: 0.0,
                    after: 0.0,
                    unrestored: 0,
                }))
            }
            Spec::Scale { factor, part } => Stage::Scale(*factor, *part),
            Spec::Dampen {
                forget,
                retain,
                rule,
            } => Stage::Dampen(forget.clone(), retain.clone(), *rule),
        };
        self.stages = self.specs.iter().map(stage).collect();
    }

    /// Stages that measure, each with the number of times it has to see the matrix before it is applied.
    pub fn passes(&self) -> Vec<usize> {
        let count = |(k, s): (usize, &Stage<T>)| match s {
            Stage::Columns(c) => vec![k; c.passes()],
            _ => Vec::new(),
        };
        self.stages.iter().enumerate().flat_map(count).collect()
    }

    /// Shows a tile of the stored matrix to stage `k`: the stages before it are applied first.
    pub fn measure(&mut self, k: usize, at: At, tile: &mut [T]) -> Result<()> {
        for i in 0..k {
            self.apply_one(i, at, tile, false)?;
        }
        let rows = Rows::matrix(tile, self.grid.width);
        check(&rows, at, self.grid)?;
        match &mut self.stages[k] {
            Stage::Columns(c) => c.measure(at.row, &rows),
            _ => Ok(()),
        }
    }

    pub fn end_pass(&mut self, k: usize) -> Result<()> {
        match &mut self.stages[k] {
            Stage::Columns(c) => c.end_pass(),
            _ => Ok(()),
        }
    }

    /// Keeps what [`Chain::inverses`] needs, once all passes are done.
    pub fn keep_factors(&mut self) {
        let factors = |s: &Stage<T>| match s {
            Stage::Columns(c) => c.factors().map(Arc::new),
            _ => None,
        };
        self.factors = self.stages.iter().map(factors).collect();
    }

    /// All the edits of a tile, in order.
    pub fn apply(&mut self, at: At, tile: &mut [T]) -> Result<()> {
        (0..self.stages.len()).try_for_each(|k| self.apply_one(k, at, tile, true))
    }

    /// One stage; `last` where its result is the one that is stored.
    fn apply_one(&mut self, k: usize, at: At, tile: &mut [T], last: bool) -> Result<()> {
        let (grid, width) = (self.grid, self.grid.width);
        match &mut self.stages[k] {
            Stage::Columns(c) => {
                if last {
                    c.update(at.row, tile);
                    c.measure_after(at.row, &Rows::matrix(tile, width));
                } else {
                    c.preview(at.row, tile);
                }
            }
            Stage::Rows(stage) => {
                check(&Rows::matrix(tile, width), at, grid)?;
                let first = at.element(grid);
                if last {
                    return stage.edit_recorded(tile, width, first);
                }
                for run in runs(stage.part, first, tile.len()) {
                    stage.edit.apply(RowsMut::matrix(&mut tile[run], width))?;
                }
            }
            Stage::Scale(factor, part) => {
                for run in runs(*part, at.element(grid), tile.len()) {
                    dispatch(Multiply(&mut tile[run], T::Acc::from_f64(*factor)));
                }
            }
            Stage::Dampen(forget, retain, rule) => {
                let found = dampened(tile, forget, retain, rule, at.element(grid))?;
                if let (Done::Dampened(total), true) = (&mut self.done[k], last) {
                    *total += found;
                }
            }
        }
        Ok(())
    }

    /// Ends a matrix whose tiles are all written.
    pub fn end(&mut self) {
        for (stage, done) in self.stages.iter_mut().zip(&mut self.done) {
            match stage {
                Stage::Columns(c) => {
                    let report = c.report();
                    done.add(report.before, report.after, report.vanished as u64);
                }
                Stage::Rows(s) => done.add(s.before.sqrt(), s.after.sqrt(), s.unrestored),
                _ => {}
            }
        }
    }

    /// What undoes the edits of the current matrix up to rounding, in the order of the edits. The ones by row know the
    /// rows that have been edited.
    pub fn inverses(&self) -> Vec<Inverse<'_, T::Acc>> {
        let inverse = |(k, stage): (usize, _)| match stage {
            &Stage::<T>::Columns(_) => {
                (self.factors[k].clone()).map_or(Inverse::Unknown, Inverse::Columns)
            }
            Stage::Rows(s) => Inverse::Rows(Held::Borrowed(&s.inverse)),
            Stage::Scale(factor, part) => Inverse::Scale(*factor, *part),
            Stage::Dampen(..) => Inverse::Unknown,
        };
        self.stages.iter().enumerate().map(inverse).collect()
    }
}

fn check<T: Editable>(rows: &Rows<'_, T>, at: At, grid: Grid) -> Result<()> {
    check_finite("weight", rows).map_err(|e| match e {
        Error::NonFinite { arg, index, found } => Error::NonFinite {
            arg,
            index: index + at.element(grid),
            found,
        },
        other => other,
    })
}

impl<A: Arithmetic> RowStage<A> {
    /// Edits the rows of a tile whose first element is the `first` of the tensor.
    fn edit_recorded<T: Element<Acc = A>>(
        &mut self,
        tile: &mut [T],
        width: usize,
        first: usize,
    ) -> Result<()> {
        let (rows, rank) = (tile.len() / width.max(1), self.edit.rank());
        let inverse = &mut self.inverse;
        let start = inverse.coefficients.len() / rank.max(1);
        (inverse.coefficients).resize((start + rows) * rank, A::ZERO);
        if self.keep {
            inverse.stretched.resize(start + rows, A::ONE);
        }
        for run in runs(self.part, first, tile.len()) {
            let row = start + run.start / width;
            self.edit_run(&mut tile[run], width, row)?;
        }
        Ok(())
    }

    /// Edits rows whose inverse begins at `row`.
    fn edit_run<T: Element<Acc = A>>(
        &mut self,
        tile: &mut [T],
        width: usize,
        row: usize,
    ) -> Result<()> {
        let (rows, rank) = (tile.len() / width, self.edit.rank());
        let inverse = &mut self.inverse;
        let found = &mut inverse.coefficients[row * rank..(row + rows) * rank];
        self.edit.coefficients(&Rows::matrix(tile, width), found)?;
        self.before += squares(found);
        let old: Vec<f64> = if self.keep {
            tile.chunks_exact(width)
                .map(simd::sum_squares_f64)
                .collect()
        } else {
            Vec::new()
        };
        let gone = inverse.scale * (2.0 - inverse.scale);
        let stretched = inverse.stretched.iter_mut().skip(row);
        for ((old, c), stretched) in
            (old.iter().zip(found.chunks_exact(rank.max(1)))).zip(stretched)
        {
            let left = (old - gone * squares(c)).max(0.0);
            let factor = if *old > 0.0 { (left / old).sqrt() } else { 1.0 };
            *stretched = A::from_f64(factor);
        }
        self.edit.apply(RowsMut::matrix(tile, width))?;
        let mut after = vec![A::ZERO; rows * rank];
        self.edit
            .coefficients(&Rows::matrix(tile, width), &mut after)?;
        self.after += squares(&after);
        for (old, row) in old.iter().zip(tile.chunks_exact(width)) {
            let new = simd::sum_squares_f64(row);
            self.unrestored += u64::from(*old > 0.0 && new <= 1e-12 * old);
        }
        Ok(())
    }
}

fn squares<A: Real>(values: &[A]) -> f64 {
    values.iter().map(|v| v.to_f64() * v.to_f64()).sum()
}

struct Multiply<'a, T: Element>(&'a mut [T], T::Acc);

impl<T: Element> Kernel for Multiply<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for x in self.0 {
            *x = T::store(x.load() * self.1);
        }
    }
}

fn dampened<T: Editable>(
    tile: &mut [T],
    forget: &Importance,
    retain: &Importance,
    rule: &RuleSpec,
    first: usize,
) -> Result<Selection> {
    if forget.dtype != retain.dtype {
        return Err(Error::DType {
            arg: "retain",
            expected: forget.dtype.to_string(),
            found: retain.dtype.to_string(),
        });
    }
    let n = tile.len();
    let found = match forget.dtype {
        DType::F64 => {
            let (f, d) = (
                forget.read::<f64>(first as u64, n)?,
                retain.read::<f64>(first as u64, n)?,
            );
            let (f, d) = (Rows::matrix(&f, n), Rows::matrix(&d, n));
            dampen(RowsMut::matrix(tile, n), &f, &d, rule, Mode::Guarded)
        }
        _ => {
            let (f, d) = (
                forget.read::<f32>(first as u64, n)?,
                retain.read::<f32>(first as u64, n)?,
            );
            let (f, d) = (Rows::matrix(&f, n), Rows::matrix(&d, n));
            dampen(RowsMut::matrix(tile, n), &f, &d, rule, Mode::Guarded)
        }
    };
    let found = found.map_err(|e| match e {
        Error::NonFinite { arg, index, found } => Error::NonFinite {
            arg,
            index: index + first,
            found,
        },
        Error::Value {
            arg,
            expected,
            found,
        } => Error::Value {
            arg,
            expected,
            found: format!("{found} from element {first} on"),
        },
        other => other,
    })?;
    Ok(found.0)
}

/// A borrowed or owned value.
pub enum Held<'a, V> {
    Borrowed(&'a V),
    Owned(V),
}

impl<V> std::ops::Deref for Held<'_, V> {
    type Target = V;
    fn deref(&self) -> &V {
        match self {
            Self::Borrowed(v) => v,
            Self::Owned(v) => v,
        }
    }
}

/// What brings an edited matrix back up to rounding. Whatever is still different then is kept as such.
pub enum Inverse<'a, A> {
    Columns(Arc<Factors<A>>),
    Rows(Held<'a, RowInverse<A>>),
    Scale(f64, Option<Part>),
    /// Nothing is known: the edited tile itself is the best guess.
    Unknown,
}

impl<A: Arithmetic> Inverse<'_, A> {
    /// `row` counts within the matrix.
    pub fn apply<T: Element<Acc = A>>(&self, row: usize, width: usize, tile: &mut [T]) {
        match self {
            Self::Columns(factors) => factors.invert(row, width, tile),
            Self::Rows(inverse) => dispatch(InvertRows {
                inverse,
                row,
                width,
                tile,
            }),
            Self::Scale(factor, part) if *factor != 0.0 => {
                // Parts repeat with every matrix.
                for run in runs(*part, row * width, tile.len()) {
                    dispatch(Divide(&mut tile[run], A::from_f64(*factor)));
                }
            }
            Self::Scale(..) | Self::Unknown => {}
        }
    }
}

struct Divide<'a, T: Element>(&'a mut [T], T::Acc);

impl<T: Element> Kernel for Divide<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for x in self.0 {
            *x = T::store(x.load() / self.1);
        }
    }
}

struct InvertRows<'a, T: Element> {
    inverse: &'a RowInverse<T::Acc>,
    row: usize,
    width: usize,
    tile: &'a mut [T],
}

impl<T: Element<Acc: Arithmetic>> Kernel for InvertRows<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let (inverse, width, rank) = (self.inverse, self.width, self.inverse.q.rank);
        let q: Vec<T::Acc> = (inverse.q.rows.iter())
            .map(|v| T::Acc::from_f64(*v))
            .collect();
        let scale = T::Acc::from_f64(inverse.scale);
        let mut wide = vec![T::Acc::ZERO; width];
        for (k, row) in self.tile.chunks_exact_mut(width).enumerate() {
            let r = self.row + k;
            let left = inverse.stretched.get(r).copied().unwrap_or(T::Acc::ONE);
            for (w, x) in wide.iter_mut().zip(&*row) {
                *w = x.load() * left;
            }
            let coefficients = &inverse.coefficients[r * rank..(r + 1) * rank];
            for (c, q) in coefficients.iter().zip(q.chunks_exact(width)) {
                let c = scale * *c;
                for (w, q) in wide.iter_mut().zip(q) {
                    *w += c * *q;
                }
            }
            for (x, w) in row.iter_mut().zip(&wide) {
                *x = T::store(*w);
            }
        }
    }
}

/// Runs `$body` for the element type that a tensor is stored in.
pub fn expect_editable(tensor: &TensorInfo) -> Result<DType> {
    tensor.editable().ok_or_else(|| Error::DType {
        arg: "weight",
        expected: "F64, F32, F16 or BF16 (quantised tensors are not edited)".into(),
        found: format!("{} ({})", tensor.dtype, tensor.name),
    })
}

/// Bytes of working memory that the edits of a tensor need, at the least.
pub fn least_memory(tensor: &TensorInfo, specs: &[Spec]) -> Result<usize> {
    let dtype = expect_editable(tensor)?;
    let grid = Grid::new(&tensor.shape, specs)?;
    let tile = grid.tile_rows(dtype.size(), specs, 0) * grid.width * dtype.size();
    Ok(6 * tile + grid.scratch(specs) + with_dtype!(dtype, T => size_of::<T>()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_a_part_are_those_elements() {
        for (cycle, from, to) in [(12, 0, 12), (12, 4, 8), (6, 5, 6), (2, 1, 2), (3, 0, 2)] {
            let part = Part { cycle, from, to };
            for first in 0..25 {
                for len in 0..25 {
                    let mut found = vec![false; len];
                    for run in runs(Some(part), first, len) {
                        found[run].fill(true);
                    }
                    let expected: Vec<bool> = (first..first + len)
                        .map(|i| (from..to).contains(&(i % cycle)))
                        .collect();
                    assert_eq!(found, expected, "{part:?} of {len} from {first}");
                }
            }
        }
        assert_eq!(runs(None, 7, 5).next(), Some(0..5));
        assert_eq!(runs(None, 7, 5).count(), 1);
        assert_eq!(runs(None, 7, 0).count(), 0);
    }

    #[test]
    fn parts_that_do_not_fit() {
        let part = |cycle, from, to| {
            let factor = 2.0;
            let part = Some(Part { cycle, from, to });
            Grid::new(&[4, 6], &[Spec::Scale { factor, part }])
        };
        assert!(part(12, 6, 12).is_ok());
        for bad in [
            part(12, 6, 6),
            part(12, 6, 13),
            part(9, 0, 3),
            part(0, 0, 0),
        ] {
            assert!(bad.is_err());
        }
        let ablate = |last_axis, from| {
            let q = Orthonormal {
                width: if last_axis { 6 } else { 4 },
                rank: 1,
                rows: vec![1.0; if last_axis { 6 } else { 4 }],
            };
            let (q, scale, keep) = (Arc::new(q), 1.0, NormPreserving::No);
            let part = Some(Part {
                cycle: 12,
                from,
                to: 12,
            });
            Grid::new(
                &[4, 6],
                &[Spec::Ablate {
                    last_axis,
                    q,
                    scale,
                    keep,
                    part,
                }],
            )
        };
        assert!(ablate(true, 6).is_ok());
        assert!(ablate(true, 5).is_err());
        assert!(ablate(false, 6).is_err());
    }
}
