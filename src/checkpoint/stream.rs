//! Shards through memory of a bounded size: read, edit, hash, write, keep what undoes it.
//!
//! One thread takes a tensor from its first tile to its last, since a hash is sequential; the kernels stay on that thread.
//! Each thread takes shards of its own as long as there are any (writers of one file wait for each other inside the system,
//! and spin), then helps with the others'. The thread that ends the last tensor of a shard brings the shard to the storage
//! device and gives it its name.

use super::files::{BLOCK, Named, hex, writing};
use super::header::{Header, TensorInfo, header_of};
use super::patch::{PatchReader, PatchWriter};
use super::stages::{At, Chain, Editable, Grid, Spec, expect_editable, least_memory};
use crate::cancel::Cancel;
use crate::element::DType;
use crate::{Error, Result, par, with_dtype};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

/// Largest tile: what several of still fit the caches next to each other.
const TILE: usize = 1 << 20;
/// Buffers of the size of a tile that an edit holds at once.
const BUFFERS: usize = 6;

/// What is to be done with one shard.
#[derive(Debug, Clone, Default)]
pub struct ShardJob {
    pub source: PathBuf,
    /// Where the result goes; it has that name only when it is complete. None: nothing but hashes, or in place.
    pub dest: Option<PathBuf>,
    /// Changed tensors are written over the old ones. Whoever asks for this keeps a journal.
    pub in_place: bool,
    /// Where to write what undoes the edits.
    pub patch: Option<PathBuf>,
    /// A patch to undo, instead of edits.
    pub undo: Option<PathBuf>,
    pub edits: HashMap<String, Vec<Spec>>,
    /// Tensors that are also stored as they were: (new name, name).
    pub keep: Vec<(String, String)>,
    /// Where to write the record of a complete shard.
    pub record: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Bytes of working memory in all.
    pub memory: usize,
    /// Hash what is not edited, too.
    pub hash_all: bool,
}

enum Kind<'a> {
    Copy,
    Edit(&'a [Spec]),
    Undo,
}

/// One tensor of one shard.
struct Task<'a> {
    shard: usize,
    index: usize,
    tensor: TensorInfo,
    /// First byte in the result.
    to: u64,
    /// First byte of a copy of the old values.
    copy_to: Option<u64>,
    kind: Kind<'a>,
}

/// A shard at work.
struct Open {
    source: Named,
    out: Option<Named>,
    /// The blocks of the source are already there.
    shared: bool,
    patch: Option<PatchWriter>,
    /// Taken to write: waiting for it costs nothing, waiting inside the system a processor.
    writing: Mutex<()>,
}

struct Shard<'a> {
    job: &'a ShardJob,
    header: Header,
    out_header: Header,
    undo: Option<PatchReader>,
    open: Mutex<Option<Arc<Open>>>,
    left: AtomicUsize,
    records: Mutex<Vec<Option<Value>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn temporary(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    path.with_file_name(name)
}

/// Runs the jobs; one record per shard, in their order: `{"file", "header", "bytes", "tensors": {name: {"before",
/// "after", "ops"}}}` with SHA-256 of the header and of every tensor that was hashed.
///
/// # Errors
/// `Checkpoint` for files, `Value` for `memory`, and what the kernels complain about, with the tensor's name. Results
/// that are not complete do not have their names then.
pub fn run(jobs: &[ShardJob], options: &Options, cancel: &Cancel) -> Result<Vec<Value>> {
    let mut shards = Vec::new();
    let mut tasks = Vec::new();
    for (k, job) in jobs.iter().enumerate() {
        let shard = prepare(job)?;
        let list = tasks_of(k, &shard, job)?;
        shard.left.store(list.len(), SeqCst);
        *lock(&shard.records) = vec![None; list.len()];
        tasks.extend(list);
        shards.push(shard);
    }
    let mut least = BLOCK;
    for task in &tasks {
        if let Kind::Edit(specs) = task.kind {
            least = least.max(least_memory(&task.tensor, specs)?);
        }
    }
    let workers = par::num_threads()
        .min(options.memory / least)
        .min(tasks.len().max(1));
    if workers == 0 {
        let expected = format!("{least} bytes or more for these tensors");
        return Err(Error::value("memory", expected, options.memory));
    }
    let tile = (options.memory / workers / (2 * BUFFERS)).clamp(1, TILE);
    // Where the tasks of each shard begin; a cursor for each shard, and one over the shards.
    let starts: Vec<usize> = (0..=shards.len())
        .map(|k| tasks.partition_point(|t| t.shard < k))
        .collect();
    let cursors: Vec<AtomicUsize> = starts.iter().map(|s| AtomicUsize::new(*s)).collect();
    let (fresh, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let error: Mutex<Option<(usize, Error)>> = Mutex::new(None);
    let finished: Mutex<Vec<Option<Value>>> = Mutex::new(vec![None; shards.len()]);
    let fail = |at: usize, err: Error| {
        failed.store(true, Relaxed);
        let mut slot = lock(&error);
        if slot.as_ref().is_none_or(|(first, _)| at < *first) {
            *slot = Some((at, err));
        }
    };
    let drain = |k: usize| {
        while !failed.load(Relaxed) {
            let at = cursors[k].fetch_add(1, SeqCst);
            if at >= starts[k + 1] {
                return;
            }
            let (task, shard) = (&tasks[at], &shards[k]);
            let done = shard.begin().and_then(|open| {
                one(task, shard, &open, tile, options, cancel)
                    .map_err(|e| named(&task.tensor.name, e))
            });
            match done.and_then(|record| shard.end(task.index, record)) {
                Ok(Some(record)) => lock(&finished)[k] = Some(record),
                Ok(None) => {}
                Err(err) => fail(at, err),
            }
        }
    };
    let work = || {
        par::alone(|| {
            loop {
                let k = fresh.fetch_add(1, SeqCst);
                if k >= shards.len() {
                    break;
                }
                drain(k);
            }
            (0..shards.len()).for_each(drain);
        });
    };
    std::thread::scope(|scope| {
        for _ in 1..workers {
            scope.spawn(work);
        }
        work();
    });
    if let Some((_, err)) = lock(&error).take() {
        return Err(err);
    }
    // Shards without a tensor have no last one to end them.
    for (shard, slot) in shards.iter().zip(lock(&finished).iter_mut()) {
        if slot.is_none() {
            shard.begin()?;
            *slot = Some(shard.finish()?);
        }
    }
    Ok(lock(&finished).drain(..).flatten().collect())
}

/// The error, with the name of the tensor it speaks of.
fn named(name: &str, err: Error) -> Error {
    let more = |text: String| format!("{text} (tensor {name:?})");
    match err {
        Error::Shape {
            arg,
            expected,
            found,
        } => Error::Shape {
            arg,
            expected,
            found: more(found),
        },
        Error::DType {
            arg,
            expected,
            found,
        } => Error::DType {
            arg,
            expected,
            found: more(found),
        },
        Error::Value {
            arg,
            expected,
            found,
        } => Error::Value {
            arg,
            expected,
            found: more(found),
        },
        Error::Degenerate { arg, reason } => Error::Degenerate {
            arg,
            reason: more(reason),
        },
        Error::NonFinite { arg, index, found } => Error::Value {
            arg,
            expected: "finite values".into(),
            found: more(format!("{found} at flat index {index}")),
        },
        other => other,
    }
}

fn prepare(job: &ShardJob) -> Result<Shard<'_>> {
    let header = header_of(&Named::open(&job.source)?)?;
    let undo = job.undo.as_deref().map(PatchReader::open).transpose()?;
    let out_header = match &undo {
        Some(patch) => patch.old_header()?,
        None if job.keep.is_empty() => header.clone(),
        None => header.with_copies(&job.source, &job.keep)?,
    };
    if job.in_place && out_header != header {
        let reason = "the edit changes which tensors there are, which cannot be done in place";
        return Err(Error::checkpoint(&job.source, reason));
    }
    for name in job.edits.keys() {
        if header.tensor(name).is_none() {
            return Err(Error::checkpoint(
                &job.source,
                format!("holds no tensor {name:?}"),
            ));
        }
    }
    Ok(Shard {
        job,
        header,
        out_header,
        undo,
        open: Mutex::new(None),
        left: AtomicUsize::new(0),
        records: Mutex::new(Vec::new()),
    })
}

fn tasks_of<'a>(k: usize, shard: &Shard<'_>, job: &'a ShardJob) -> Result<Vec<Task<'a>>> {
    let mut by_name: HashMap<&str, &TensorInfo> = HashMap::new();
    by_name.extend(shard.out_header.tensors.iter().map(|t| (&t.name[..], t)));
    let copies: HashMap<&str, &str> = job
        .keep
        .iter()
        .map(|(new, old)| (&old[..], &new[..]))
        .collect();
    let mut found = 0;
    let mut out = Vec::new();
    for tensor in &shard.header.tensors {
        let Some(to) = by_name.get(&tensor.name[..]) else {
            continue; // a copy that the undone edit had added
        };
        if to.dtype != tensor.dtype || to.shape != tensor.shape {
            let reason = format!("{:?} is not the tensor that was edited", tensor.name);
            return Err(Error::checkpoint(&job.source, reason));
        }
        found += 1;
        let undone = shard
            .undo
            .as_ref()
            .is_some_and(|p| p.tensor(&tensor.name).is_some());
        let kind = match job.edits.get(&tensor.name) {
            Some(specs) if !specs.is_empty() && tensor.bytes() > 0 => {
                expect_editable(tensor)?;
                Kind::Edit(specs)
            }
            _ if undone => Kind::Undo,
            _ => Kind::Copy,
        };
        out.push(Task {
            shard: k,
            index: out.len(),
            tensor: tensor.clone(),
            to: to.begin,
            copy_to: copies.get(&tensor.name[..]).map(|new| by_name[new].begin),
            kind,
        });
    }
    if shard.undo.is_some() && found != shard.out_header.tensors.len() {
        return Err(Error::checkpoint(
            &job.source,
            "misses tensors that the patch knows",
        ));
    }
    Ok(out)
}

impl Shard<'_> {
    /// Opens the files when the first tensor comes.
    fn begin(&self) -> Result<Arc<Open>> {
        let mut slot = lock(&self.open);
        if let Some(open) = &*slot {
            return Ok(open.clone());
        }
        let source = if self.job.in_place {
            Named::modify(&self.job.source)?
        } else {
            Named::open(&self.job.source)?
        };
        let fresh = |path: &Path| -> Result<PathBuf> {
            let path = temporary(path);
            match fs::remove_file(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(writing(&path, &e)),
                _ => Ok(path),
            }
        };
        let (mut out, mut shared) = (None, false);
        if let Some(dest) = &self.job.dest {
            let file = Named::create(&fresh(dest)?)?;
            shared = self.out_header == self.header && file.share_blocks_of(&source);
            file.set_len(self.out_header.file_len())?;
            if !shared {
                file.write_at(0, &self.out_header.raw)?;
            }
            out = Some(file);
        }
        let patch = match &self.job.patch {
            Some(path) => Some(PatchWriter::create(&fresh(path)?, &self.header)?),
            None => None,
        };
        let open = Arc::new(Open {
            source,
            out,
            shared,
            patch,
            writing: Mutex::new(()),
        });
        *slot = Some(open.clone());
        Ok(open)
    }

    /// Takes the record of a tensor; after the last one, ends the shard.
    fn end(&self, index: usize, record: Value) -> Result<Option<Value>> {
        lock(&self.records)[index] = Some(record);
        if self.left.fetch_sub(1, SeqCst) > 1 {
            return Ok(None);
        }
        self.finish().map(Some)
    }

    fn finish(&self) -> Result<Value> {
        let open = lock(&self.open).take();
        let open = open.ok_or_else(|| Error::checkpoint(&self.job.source, "was not opened"))?;
        if let (Some(patch), Some(path)) = (&open.patch, &self.job.patch) {
            patch.finish(&self.header)?;
            rename(&temporary(path), path)?;
        }
        if let (Some(out), Some(dest)) = (&open.out, &self.job.dest) {
            out.sync()?;
            rename(&temporary(dest), dest)?;
        } else if self.job.in_place {
            open.source.sync()?;
        }
        let tensors: serde_json::Map<String, Value> = (lock(&self.records).drain(..).flatten())
            .flat_map(|r| match r {
                Value::Array(pairs) => pairs,
                other => vec![other],
            })
            .filter_map(|mut r| Some((r["name"].take().as_str()?.to_owned(), r)))
            .collect();
        let record = json!({"header": self.out_header.sha256(), "bytes": self.out_header.file_len(),
            "tensors": tensors});
        if let Some(path) = &self.job.record {
            let part = temporary(path);
            let write = || -> std::io::Result<()> {
                fs::write(&part, record.to_string())?;
                fs::File::open(&part)?.sync_all()
            };
            write().map_err(|e| writing(&part, &e))?;
            rename(&part, path)?;
        }
        Ok(record)
    }
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|e| writing(to, &e))
}

fn one(
    task: &Task<'_>,
    shard: &Shard<'_>,
    open: &Open,
    tile: usize,
    options: &Options,
    cancel: &Cancel,
) -> Result<Value> {
    let ctx = Context {
        task,
        open,
        out: open
            .out
            .as_ref()
            .or(shard.job.in_place.then_some(&open.source)),
        in_place: shard.job.in_place,
        tile,
        cancel,
    };
    match &task.kind {
        Kind::Copy => ctx.copy(options.hash_all),
        Kind::Edit(specs) => match expect_editable(&task.tensor)? {
            DType::F64 => ctx.edit::<f64>(specs),
            DType::F32 => ctx.edit::<f32>(specs),
            DType::F16 => ctx.edit::<half::f16>(specs),
            DType::BF16 => ctx.edit::<half::bf16>(specs),
        },
        Kind::Undo => {
            let undo = (shard.undo.as_ref()).and_then(|p| Some((p, p.tensor(&task.tensor.name)?)));
            let Some((patch, entry)) = undo else {
                return ctx.copy(options.hash_all);
            };
            let dtype = expect_editable(&task.tensor)?;
            with_dtype!(dtype, T => ctx.undo::<T>(patch, entry))
        }
    }
}

struct Context<'a> {
    task: &'a Task<'a>,
    open: &'a Open,
    out: Option<&'a Named>,
    in_place: bool,
    tile: usize,
    cancel: &'a Cancel,
}

/// A cut of a matrix: first row, rows.
fn cuts(grid: Grid, rows: usize) -> Vec<(usize, usize)> {
    par::ranges(grid.rows, rows)
        .into_iter()
        .map(|r| (r.start, r.len()))
        .collect()
}

impl Context<'_> {
    fn copy(&self, hash: bool) -> Result<Value> {
        let (t, source) = (&self.task.tensor, &self.open.source);
        let record = |hash: Option<String>| json!({"name": t.name, "before": hash, "after": hash});
        let out = self.out.filter(|_| !self.in_place && !self.open.shared);
        if !hash
            && (out.is_none()
                || (self.task.to == t.begin
                    && out.is_some_and(|o| o.copy_range_of(source, t.begin, t.bytes()))))
        {
            self.cancel.advance(t.bytes());
            return Ok(record(None));
        }
        let mut buffer = vec![0; BLOCK.min(t.bytes() as usize)];
        let (mut done, mut digest) = (0, Sha256::new());
        while done < t.bytes() {
            self.cancel.check()?;
            // Writes that end where blocks of the file do are the ones that the system takes in large pieces.
            let to_edge = BLOCK - ((self.task.to + done) % BLOCK as u64) as usize;
            let part = to_edge.min((t.bytes() - done) as usize);
            let part = &mut buffer[..part];
            source.read_at(t.begin + done, part)?;
            if hash {
                digest.update(&*part);
            }
            if let Some(out) = out {
                self.put(out, self.task.to + done, part)?;
            }
            done += part.len() as u64;
            self.cancel.advance(part.len() as u64);
        }
        Ok(record(hash.then(|| hex(&digest.finalize()))))
    }

    fn put(&self, out: &Named, at: u64, bytes: &[u8]) -> Result<()> {
        let _turn = lock(&self.open.writing);
        out.write_at(at, bytes)
    }

    fn offset<T>(&self, grid: Grid, at: At) -> u64 {
        (((at.matrix * grid.rows + at.row) * grid.width) * size_of::<T>()) as u64
    }

    fn read<T: Editable>(&self, grid: Grid, at: At, tile: &mut [T]) -> Result<()> {
        self.cancel.check()?;
        let from = self.task.tensor.begin + self.offset::<T>(grid, at);
        self.open
            .source
            .read_at(from, bytemuck::cast_slice_mut(tile))
    }

    fn edit<T: Editable>(&self, specs: &[Spec]) -> Result<Value> {
        let t = &self.task.tensor;
        let grid = Grid::new(&t.shape, specs)?;
        let rows = grid.tile_rows(size_of::<T>(), specs, self.tile);
        let mut chain = Chain::<T>::new(specs, grid);
        let buffer = || vec![T::default(); rows.min(grid.rows) * grid.width];
        let (mut old, mut new) = (buffer(), buffer());
        let mut guess = if self.open.patch.is_some() {
            buffer()
        } else {
            Vec::new()
        };
        let (mut before, mut after) = (Sha256::new(), Sha256::new());
        let mut matrices = Vec::new();
        for matrix in 0..grid.matrices {
            chain.begin();
            for k in chain.passes() {
                for (row, n) in cuts(grid, rows) {
                    let (at, tile) = (At { matrix, row }, &mut new[..n * grid.width]);
                    self.read(grid, at, tile)?;
                    chain.measure(k, at, tile)?;
                }
                chain.end_pass(k)?;
            }
            chain.keep_factors();
            let mut tiles = Vec::new();
            for (row, n) in cuts(grid, rows) {
                let (at, len) = (At { matrix, row }, n * grid.width);
                let (old, new) = (&mut old[..len], &mut new[..len]);
                self.read(grid, at, old)?;
                before.update(bytemuck::cast_slice::<T, u8>(old));
                new.copy_from_slice(old);
                chain.apply(at, new)?;
                after.update(bytemuck::cast_slice::<T, u8>(new));
                self.write(grid, at, old, new)?;
                if let Some(patch) = &self.open.patch {
                    let guess = &mut guess[..len];
                    guess.copy_from_slice(new);
                    for inverse in chain.inverses().iter().rev() {
                        inverse.apply(row, grid.width, guess);
                    }
                    let wrong = bytemuck::cast_slice_mut::<T, u8>(guess);
                    let old = bytemuck::cast_slice::<T, u8>(old);
                    wrong.iter_mut().zip(old).for_each(|(w, o)| *w ^= o);
                    tiles.push(patch.tile(wrong, size_of::<T>())?);
                }
                self.cancel.advance((len * size_of::<T>()) as u64);
            }
            if let Some(patch) = &self.open.patch {
                let inverses = patch.inverses(&chain.inverses())?;
                matrices.push(json!({"inverses": inverses, "tiles": tiles}));
            }
            chain.end();
        }
        if let Some(patch) = &self.open.patch {
            let cut = [grid.matrices, grid.rows, grid.width, rows];
            let entry = json!({"name": t.name, "cut": cut, "matrices": matrices});
            patch.tensor(self.task.index, entry);
        }
        let ops: Vec<Value> = chain.done.iter().map(|d| d.to_json()).collect();
        let (before, after) = (hex(&before.finalize()), hex(&after.finalize()));
        let record = json!({"name": t.name, "before": before, "after": after, "ops": ops});
        Ok(record)
    }

    fn write<T: Editable>(&self, grid: Grid, at: At, old: &[T], new: &[T]) -> Result<()> {
        let Some(out) = self.out else { return Ok(()) };
        let (old, new) = (
            bytemuck::cast_slice::<T, u8>(old),
            bytemuck::cast_slice::<T, u8>(new),
        );
        let offset = self.offset::<T>(grid, at);
        if !(self.in_place || self.open.shared) || old != new {
            self.put(out, self.task.to + offset, new)?;
        }
        match self.task.copy_to {
            Some(to) => self.put(out, to + offset, old),
            None => Ok(()),
        }
    }

    fn undo<T: Editable>(&self, patch: &PatchReader, entry: &Value) -> Result<Value> {
        let t = &self.task.tensor;
        let bad = || {
            Error::checkpoint(
                &self.open.source.path,
                format!("the patch does not fit {:?}", t.name),
            )
        };
        let cut: Vec<usize> = serde_json::from_value(entry["cut"].clone()).map_err(|_| bad())?;
        let [count, rows, width, step] = cut[..] else {
            return Err(bad());
        };
        let grid = Grid {
            matrices: count,
            rows,
            width,
        };
        let size = (count.checked_mul(rows))
            .and_then(|n| n.checked_mul(width))
            .and_then(|n| n.checked_mul(size_of::<T>()));
        let matrices = entry["matrices"].as_array().ok_or_else(bad)?;
        if size != Some(t.bytes() as usize) || matrices.len() != count || step == 0 {
            return Err(bad());
        }
        let mut old = vec![T::default(); step.min(rows) * width];
        let mut new = old.clone();
        let (mut before, mut after) = (Sha256::new(), Sha256::new());
        for (matrix, kept) in matrices.iter().enumerate() {
            let inverses = patch.inverses::<T>(&kept["inverses"], grid)?;
            let tiles = kept["tiles"].as_array().ok_or_else(bad)?;
            let cuts = cuts(grid, step);
            if tiles.len() != cuts.len() {
                return Err(bad());
            }
            for ((row, n), kept) in cuts.into_iter().zip(tiles) {
                let (at, len) = (At { matrix, row }, n * width);
                let (old, new) = (&mut old[..len], &mut new[..len]);
                self.read(grid, at, old)?;
                before.update(bytemuck::cast_slice::<T, u8>(old));
                new.copy_from_slice(old);
                for inverse in inverses.iter().rev() {
                    inverse.apply(row, width, new);
                }
                patch.correct(kept, size_of::<T>(), bytemuck::cast_slice_mut(new))?;
                after.update(bytemuck::cast_slice::<T, u8>(new));
                self.write(grid, at, old, new)?;
                self.cancel.advance((len * size_of::<T>()) as u64);
            }
        }
        let (before, after) = (hex(&before.finalize()), hex(&after.finalize()));
        Ok(json!({"name": t.name, "before": before, "after": after, "ops": [{"op": "undo"}]}))
    }
}
