//! Shards through memory of a bounded size: read, edit, hash, write, keep what undoes it.
//!
//! One thread takes a tensor from its first tile to its last, since a hash is sequential; the kernels stay on that thread.
//! Two tensors that are only copied are taken together, since their hashes cost little more than one does. Each thread
//! takes shards of its own as long as there are any, then helps with the others'; what it has done is written by threads
//! of [`super::writer`]. The thread that ends the last tensor of a shard brings the shard to the storage device and gives
//! it its name.

use super::files::{BLOCK, Named, writing};
use super::hash::Sha256;
use super::header::{Header, TensorInfo, header_of};
use super::patch::{PatchReader, PatchWriter};
use super::stages::{At, Chain, Editable, Grid, Spec, expect_editable, least_memory};
use super::writer::{Output, Sink, Writers};
use crate::cancel::Cancel;
use crate::{Error, Result, par, with_dtype};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

/// Largest tile, and read of a copy: what several of still fit the caches next to each other.
const TILE: usize = 1 << 18;
/// Buffers of the size of a tile that an edit holds at once.
const BUFFERS: usize = 6;
/// Buffers for writing that each thread has: it fills two at most, the others are on their way.
const BLOCKS: usize = 4;

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
    index: usize,
    tensor: TensorInfo,
    /// First byte in the result.
    to: u64,
    /// First byte of a copy of the old values.
    copy_to: Option<u64>,
    kind: Kind<'a>,
}

/// What a thread takes: a tensor, or two that are copied and hashed.
struct Unit<'a> {
    shard: usize,
    tasks: Vec<Task<'a>>,
}

/// A shard at work.
struct Open {
    source: Named,
    out: Option<Arc<Output>>,
    /// The blocks of the source are already there.
    shared: bool,
    patch: Option<PatchWriter>,
    /// Taken to write in place: waiting for it costs nothing, waiting inside the system a processor.
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
    let mut units = Vec::new();
    for (k, job) in jobs.iter().enumerate() {
        let shard = prepare(job)?;
        let list = tasks_of(&shard, job)?;
        shard.left.store(list.len(), SeqCst);
        *lock(&shard.records) = vec![None; list.len()];
        units.extend(units_of(k, list, options.hash_all));
        shards.push(shard);
    }
    let mut least = BLOCK;
    for task in units.iter().flat_map(|u| &u.tasks) {
        if let Kind::Edit(specs) = task.kind {
            least = least.max(least_memory(&task.tensor, specs)?);
        }
    }
    let workers = par::num_threads()
        .min(options.memory / least)
        .min(units.len().max(1));
    if workers == 0 {
        let expected = format!("{least} bytes or more for these tensors");
        return Err(Error::value("memory", expected, options.memory));
    }
    let tile = (options.memory / workers / (2 * BUFFERS)).clamp(1, TILE);
    let writes = jobs.iter().any(|j| j.dest.is_some());
    let writers = Writers::new(
        if writes { workers * BLOCKS } else { 0 },
        (options.memory / workers / (4 * BLOCKS)).min(BLOCK),
    );
    // Where the units of each shard begin; a cursor for each shard, and one over the shards.
    let starts: Vec<usize> = (0..=shards.len())
        .map(|k| units.partition_point(|u| u.shard < k))
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
            let (unit, shard) = (&units[at], &shards[k]);
            let done = shard.begin().and_then(|open| {
                let work = Work {
                    shard,
                    open,
                    writers: &writers,
                    tile,
                    hash_all: options.hash_all,
                    cancel,
                };
                work.unit(unit)
            });
            match done.and_then(|records| shard.end(&unit.tasks, records)) {
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
    std::thread::scope(|outer| {
        if writes {
            (0..workers).for_each(|_| drop(outer.spawn(|| writers.run())));
        }
        let _end = Closing(&writers);
        std::thread::scope(|scope| {
            for _ in 1..workers {
                scope.spawn(work);
            }
            work();
        });
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

/// Ends the writing threads, also when a thread panics.
struct Closing<'w>(&'w Writers);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
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

fn tasks_of<'a>(shard: &Shard<'_>, job: &'a ShardJob) -> Result<Vec<Task<'a>>> {
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

/// Edits one by one; then copies, those of like length together where they are hashed.
fn units_of(shard: usize, tasks: Vec<Task<'_>>, hash_all: bool) -> Vec<Unit<'_>> {
    let (mut copies, edits): (Vec<_>, Vec<_>) = tasks
        .into_iter()
        .partition(|t| matches!(t.kind, Kind::Copy) && hash_all);
    copies.sort_by_key(|t| std::cmp::Reverse(t.tensor.bytes()));
    let mut out: Vec<Unit<'_>> = (edits.into_iter().map(|t| vec![t]))
        .map(|tasks| Unit { shard, tasks })
        .collect();
    let mut copies = copies.into_iter();
    while let Some(first) = copies.next() {
        let tasks = std::iter::once(first).chain(copies.next()).collect();
        out.push(Unit { shard, tasks });
    }
    out
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
            let mut file = Named::create(&fresh(dest)?)?;
            shared = self.out_header == self.header && file.share_blocks_of(&source);
            if !shared {
                file.reserve(self.out_header.file_len())?;
                file.write_at(0, &self.out_header.raw)?;
            }
            out = Some(Arc::new(Output::new(file)));
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

    /// Takes the records of some tensors; after the last one, ends the shard.
    fn end(&self, tasks: &[Task<'_>], records: Vec<Value>) -> Result<Option<Value>> {
        let mut all = lock(&self.records);
        for (task, record) in tasks.iter().zip(records) {
            all[task.index] = Some(record);
        }
        drop(all);
        if self.left.fetch_sub(tasks.len(), SeqCst) > tasks.len() {
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
            out.settle()?;
            out.file.sync()?;
            rename(&temporary(dest), dest)?;
        } else if self.job.in_place {
            open.source.sync()?;
        }
        let tensors: serde_json::Map<String, Value> = (lock(&self.records).drain(..).flatten())
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

/// What a thread needs to do its part of a shard.
struct Work<'a> {
    shard: &'a Shard<'a>,
    open: Arc<Open>,
    writers: &'a Writers,
    tile: usize,
    hash_all: bool,
    cancel: &'a Cancel,
}

/// A cut of a matrix: first row, rows.
fn cuts(grid: Grid, rows: usize) -> Vec<(usize, usize)> {
    par::ranges(grid.rows, rows)
        .into_iter()
        .map(|r| (r.start, r.len()))
        .collect()
}

/// A tensor that is being copied.
struct Lane<'w> {
    begin: u64,
    len: u64,
    done: u64,
    out: Option<Sink<'w>>,
    /// Where pieces are read to that are not written.
    buffer: Vec<u8>,
}

impl Lane<'_> {
    /// Where the next piece comes to lie; nothing after the last one.
    fn room(&mut self, piece: usize) -> &mut [u8] {
        let left = self.len - self.done;
        match &mut self.out {
            _ if left == 0 => &mut [],
            Some(out) => out.room(left, piece),
            None => {
                self.buffer.resize(left.min(piece as u64) as usize, 0);
                &mut self.buffer
            }
        }
    }

    fn filled(&mut self, len: usize) -> Result<()> {
        self.done += len as u64;
        match &mut self.out {
            Some(out) if len > 0 => out.filled(len),
            _ => Ok(()),
        }
    }
}

impl<'a> Work<'a> {
    fn unit(&self, unit: &Unit<'_>) -> Result<Vec<Value>> {
        let [task] = &unit.tasks[..] else {
            return self.copy(&unit.tasks);
        };
        let one = match &task.kind {
            Kind::Copy => return self.copy(&unit.tasks),
            Kind::Edit(specs) => expect_editable(&task.tensor)
                .and_then(|dtype| with_dtype!(dtype, T => self.edit::<T>(task, specs))),
            Kind::Undo => {
                let undo = self.shard.undo.as_ref();
                let Some((patch, entry)) =
                    undo.and_then(|p| Some((p, p.tensor(&task.tensor.name)?)))
                else {
                    return self.copy(&unit.tasks);
                };
                expect_editable(&task.tensor)
                    .and_then(|dtype| with_dtype!(dtype, T => self.undo::<T>(task, patch, entry)))
            }
        };
        match one {
            Ok(record) => Ok(vec![record]),
            Err(err) => Err(named(&task.tensor.name, err)),
        }
    }

    /// Where a range of the result is written from its begin to its end; none where only changes are written.
    fn sink(&self, at: u64) -> Option<Sink<'a>> {
        let out = self.open.out.as_ref().filter(|_| !self.open.shared)?;
        Some(Sink::new(self.writers, out, at))
    }

    /// Copies tensors and hashes them, one or two together.
    fn copy(&self, tasks: &[Task<'_>]) -> Result<Vec<Value>> {
        let source = &self.open.source;
        if let ([task], false) = (tasks, self.hash_all) {
            let t = &task.tensor;
            let within = |out: &Output| {
                // What goes past the page cache does so as fast, and is on the storage device then.
                task.to == t.begin
                    && !out.file.is_direct()
                    && out.file.copy_range_of(source, t.begin, t.bytes())
            };
            let out = self.open.out.as_ref().filter(|_| !self.open.shared);
            if out.is_none_or(|o| within(o)) {
                self.cancel.advance(t.bytes());
                return Ok(vec![json!({"name": t.name, "before": null, "after": null})]);
            }
        }
        let lane = |task: &Task<'_>| Lane {
            begin: task.tensor.begin,
            len: task.tensor.bytes(),
            done: 0,
            out: self.sink(task.to),
            buffer: Vec::new(),
        };
        let mut lanes: Vec<Lane<'_>> = tasks.iter().map(lane).collect();
        let mut hashes = vec![Sha256::new(); tasks.len()];
        while lanes.iter().any(|l| l.done < l.len) {
            self.cancel.check()?;
            let mut pieces = Vec::new();
            for lane in &mut lanes {
                let at = lane.begin + lane.done;
                let room = lane.room(TILE);
                source.read_at(at, room)?;
                pieces.push(&*room);
            }
            match (&mut hashes[..], &pieces[..]) {
                _ if !self.hash_all => {}
                ([a, b], [for_a, for_b]) => Sha256::update_both(a, for_a, b, for_b),
                (all, _) => all.iter_mut().zip(&pieces).for_each(|(h, p)| h.update(p)),
            }
            let lens: Vec<usize> = pieces.iter().map(|p| p.len()).collect();
            for (lane, len) in lanes.iter_mut().zip(lens) {
                lane.filled(len)?;
                self.cancel.advance(len as u64);
            }
        }
        for out in lanes.iter_mut().filter_map(|l| l.out.as_mut()) {
            out.flush()?;
        }
        let record = |(task, hash): (&Task<'_>, Sha256)| {
            let hash = self.hash_all.then(|| hash.hex());
            json!({"name": task.tensor.name, "before": hash, "after": hash})
        };
        Ok(tasks.iter().zip(hashes).map(record).collect())
    }

    fn put(&self, out: &Named, at: u64, bytes: &[u8]) -> Result<()> {
        let _turn = lock(&self.open.writing);
        out.write_at(at, bytes)
    }

    fn offset<T>(&self, grid: Grid, at: At) -> u64 {
        (((at.matrix * grid.rows + at.row) * grid.width) * size_of::<T>()) as u64
    }

    fn read<T: Editable>(&self, task: &Task<'_>, grid: Grid, at: At, tile: &mut [T]) -> Result<()> {
        self.cancel.check()?;
        let from = task.tensor.begin + self.offset::<T>(grid, at);
        self.open
            .source
            .read_at(from, bytemuck::cast_slice_mut(tile))
    }

    fn edit<T: Editable>(&self, task: &Task<'_>, specs: &[Spec]) -> Result<Value> {
        let t = &task.tensor;
        let grid = Grid::new(&t.shape, specs)?;
        let rows = grid.tile_rows(size_of::<T>(), specs, self.tile);
        let mut chain = Chain::<T>::new(specs, grid);
        let buffer = || vec![T::default(); rows.min(grid.rows) * grid.width];
        let (mut old, mut new) = (buffer(), buffer());
        let mut patch = match &self.open.patch {
            Some(patch) => Some((patch, patch.packer()?, buffer())),
            None => None,
        };
        let mut change = Change::new(self, task);
        let mut matrices = Vec::new();
        for matrix in 0..grid.matrices {
            chain.begin();
            for k in chain.passes() {
                for (row, n) in cuts(grid, rows) {
                    let (at, tile) = (At { matrix, row }, &mut new[..n * grid.width]);
                    self.read(task, grid, at, tile)?;
                    chain.measure(k, at, tile)?;
                }
                chain.end_pass(k)?;
            }
            chain.keep_factors();
            let mut tiles = Vec::new();
            for (row, n) in cuts(grid, rows) {
                let (at, len) = (At { matrix, row }, n * grid.width);
                let (old, new) = (&mut old[..len], &mut new[..len]);
                self.read(task, grid, at, old)?;
                new.copy_from_slice(old);
                chain.apply(at, new)?;
                let (old, changed) = (bytemuck::cast_slice(old), bytemuck::cast_slice(new));
                change.add(self.offset::<T>(grid, at), old, changed)?;
                if let Some((patch, packer, guess)) = &mut patch {
                    let guess = &mut guess[..len];
                    guess.copy_from_slice(new);
                    for inverse in chain.inverses().iter().rev() {
                        inverse.apply(row, grid.width, guess);
                    }
                    let guess = bytemuck::cast_slice::<T, u8>(guess);
                    tiles.push(patch.tile(packer, guess, old, size_of::<T>())?);
                }
                self.cancel.advance((len * size_of::<T>()) as u64);
            }
            if let Some((patch, ..)) = &patch {
                let inverses = patch.inverses(&chain.inverses())?;
                matrices.push(json!({"inverses": inverses, "tiles": tiles}));
            }
            chain.end();
        }
        if let Some((patch, ..)) = &patch {
            let cut = [grid.matrices, grid.rows, grid.width, rows];
            let entry = json!({"name": t.name, "cut": cut, "matrices": matrices});
            patch.tensor(task.index, entry);
        }
        change.end(chain.done.iter().map(|d| d.to_json()).collect())
    }

    fn undo<T: Editable>(
        &self,
        task: &Task<'_>,
        patch: &PatchReader,
        entry: &Value,
    ) -> Result<Value> {
        let t = &task.tensor;
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
        let mut change = Change::new(self, task);
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
                self.read(task, grid, at, old)?;
                new.copy_from_slice(old);
                for inverse in inverses.iter().rev() {
                    inverse.apply(row, width, new);
                }
                patch.correct(kept, size_of::<T>(), bytemuck::cast_slice_mut(new))?;
                let (old, new) = (bytemuck::cast_slice(old), bytemuck::cast_slice(new));
                change.add(self.offset::<T>(grid, at), old, new)?;
                self.cancel.advance((len * size_of::<T>()) as u64);
            }
        }
        change.end(vec![json!({"op": "undo"})])
    }
}

/// A tensor that is being changed: where both forms of it go, and their hashes.
struct Change<'a> {
    work: &'a Work<'a>,
    task: &'a Task<'a>,
    new: Option<Sink<'a>>,
    copy: Option<Sink<'a>>,
    before: Sha256,
    after: Sha256,
}

impl<'a> Change<'a> {
    fn new(work: &'a Work<'a>, task: &'a Task<'a>) -> Self {
        Self {
            work,
            task,
            new: work.sink(task.to),
            copy: task.copy_to.and_then(|to| work.sink(to)),
            before: Sha256::new(),
            after: Sha256::new(),
        }
    }

    /// Takes the next tile, which lies at `offset` in the tensor.
    fn add(&mut self, offset: u64, old: &[u8], new: &[u8]) -> Result<()> {
        Sha256::update_both(&mut self.before, old, &mut self.after, new);
        if let Some(copy) = &mut self.copy {
            copy.write(old)?;
        }
        let open = &self.work.open;
        let at = self.task.to + offset;
        match (&mut self.new, &open.out) {
            (Some(sink), _) => sink.write(new),
            _ if old == new => Ok(()),
            (None, Some(out)) => self.work.put(&out.file, at, new),
            (None, None) if self.work.shard.job.in_place => self.work.put(&open.source, at, new),
            (None, None) => Ok(()),
        }
    }

    fn end(mut self, ops: Vec<Value>) -> Result<Value> {
        for sink in [&mut self.new, &mut self.copy].into_iter().flatten() {
            sink.flush()?;
        }
        let (before, after) = (self.before.hex(), self.after.hex());
        let name = &self.task.tensor.name;
        Ok(json!({"name": name, "before": before, "after": after, "ops": ops}))
    }
}
