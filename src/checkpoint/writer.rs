//! Threads that write while others compute.
//!
//! A new shard is reserved in full and then written past the page cache, where the file system allows it: the storage
//! device takes the bytes from the buffers themselves, so that a write costs a processor next to nothing, nothing has to
//! be copied and written later, and the source is not driven out of the cache.

use super::files::{ALIGN, Named};
use crate::{Error, Result};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait<'a, T>(condition: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condition
        .wait(guard)
        .unwrap_or_else(PoisonError::into_inner)
}

/// Bytes that begin at a multiple of [`ALIGN`].
struct Buffer {
    bytes: Vec<u8>,
    begin: usize,
}

impl Buffer {
    fn new(len: usize) -> Self {
        let bytes = vec![0; len + ALIGN];
        let begin = bytes.as_ptr().align_offset(ALIGN).min(ALIGN);
        Self { bytes, begin }
    }

    fn part(&mut self, from: usize, to: usize) -> &mut [u8] {
        &mut self.bytes[self.begin + from..self.begin + to]
    }
}

/// A file that is being written.
pub struct Output {
    pub file: Named,
    state: Mutex<(usize, Option<Error>)>,
    idle: Condvar,
}

impl Output {
    pub fn new(file: Named) -> Self {
        let (state, idle) = (Mutex::new((0, None)), Condvar::new());
        Self { file, state, idle }
    }

    /// Waits for what is on its way.
    ///
    /// # Errors
    /// The first that a write met.
    pub fn settle(&self) -> Result<()> {
        let mut state = lock(&self.state);
        while state.0 > 0 {
            state = wait(&self.idle, state);
        }
        state.1.take().map_or(Ok(()), Err)
    }
}

/// A buffer on its way: its bytes `from..to` belong at those places after `window`.
struct Block {
    output: Arc<Output>,
    window: u64,
    from: usize,
    to: usize,
    buffer: Buffer,
}

#[derive(Default)]
struct Queue {
    blocks: VecDeque<Block>,
    free: Vec<Buffer>,
    closed: bool,
}

/// Buffers of one size, and what is to be written.
pub struct Writers {
    size: usize,
    queue: Mutex<Queue>,
    work: Condvar,
    room: Condvar,
}

impl Writers {
    /// `count` buffers of about `size` bytes.
    pub fn new(count: usize, size: usize) -> Self {
        let size = (size / ALIGN * ALIGN).max(ALIGN);
        let free = (0..count).map(|_| Buffer::new(size)).collect();
        let queue = Queue {
            free,
            ..Queue::default()
        };
        Self {
            size,
            queue: Mutex::new(queue),
            work: Condvar::new(),
            room: Condvar::new(),
        }
    }

    /// Writes until [`Writers::close`]; what each writing thread does.
    pub fn run(&self) {
        let mut queue = lock(&self.queue);
        loop {
            let Some(mut block) = queue.blocks.pop_front() else {
                if queue.closed {
                    return;
                }
                queue = wait(&self.work, queue);
                continue;
            };
            drop(queue);
            let (from, to) = (block.from, block.to);
            let at = block.window + from as u64;
            let done = (block.output.file).write_large(at, block.buffer.part(from, to));
            {
                let mut state = lock(&block.output.state);
                state.0 -= 1;
                if let Err(err) = done {
                    state.1.get_or_insert(err);
                }
                if state.0 == 0 {
                    block.output.idle.notify_all();
                }
            }
            queue = lock(&self.queue);
            queue.free.push(block.buffer);
            self.room.notify_one();
        }
    }

    /// Ends [`Writers::run`] once everything is written.
    pub fn close(&self) {
        lock(&self.queue).closed = true;
        self.work.notify_all();
    }

    fn take(&self) -> Buffer {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(buffer) = queue.free.pop() {
                return buffer;
            }
            queue = wait(&self.room, queue);
        }
    }

    fn put(&self, block: Block) -> Result<()> {
        let failed = {
            let mut state = lock(&block.output.state);
            state.0 += usize::from(state.1.is_none());
            state.1.take()
        };
        let mut queue = lock(&self.queue);
        if let Some(err) = failed {
            queue.free.push(block.buffer);
            self.room.notify_one();
            return Err(err);
        }
        queue.blocks.push_back(block);
        self.work.notify_one();
        Ok(())
    }
}

/// Writes one range of a file from its begin to its end. Holds one buffer at most.
pub struct Sink<'w> {
    writers: &'w Writers,
    output: Arc<Output>,
    at: u64,
    /// What `buffer` begins with is at `window` in the file; `from..at` of it is not written.
    window: u64,
    from: usize,
    buffer: Option<Buffer>,
}

impl<'w> Sink<'w> {
    /// For a range that begins at `at`.
    pub fn new(writers: &'w Writers, output: &Arc<Output>, at: u64) -> Self {
        let output = output.clone();
        Self {
            writers,
            output,
            at,
            window: 0,
            from: 0,
            buffer: None,
        }
    }

    /// Room for what comes next, at most `most` bytes that end at a multiple of `piece` or before.
    pub fn room(&mut self, most: u64, piece: usize) -> &mut [u8] {
        let size = self.writers.size as u64;
        if self.buffer.is_none() {
            self.window = self.at / size * size;
            self.from = (self.at - self.window) as usize;
            self.buffer = Some(self.writers.take());
        }
        let piece = piece as u64;
        let end = (self.window + size).min((self.at / piece + 1) * piece);
        let (from, len) = ((self.at - self.window) as usize, (end - self.at).min(most));
        match &mut self.buffer {
            Some(buffer) => buffer.part(from, from + len as usize),
            None => &mut [],
        }
    }

    /// The first `len` bytes of the room are what is to be written.
    pub fn filled(&mut self, len: usize) -> Result<()> {
        self.at += len as u64;
        if self.at - self.window == self.writers.size as u64 {
            return self.flush();
        }
        Ok(())
    }

    pub fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let room = self.room(bytes.len() as u64, self.writers.size);
            let n = room.len();
            room.copy_from_slice(&bytes[..n]);
            self.filled(n)?;
            bytes = &bytes[n..];
        }
        Ok(())
    }

    /// Sends off what there is; the range is complete once [`Output::settle`] returns.
    pub fn flush(&mut self) -> Result<()> {
        let Some(buffer) = self.buffer.take() else {
            return Ok(());
        };
        self.writers.put(Block {
            output: self.output.clone(),
            window: self.window,
            from: self.from,
            to: (self.at - self.window) as usize,
            buffer,
        })
    }
}

impl Drop for Sink<'_> {
    /// After an error the buffer goes back, for others may wait for it.
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            lock(&self.writers.queue).free.push(buffer);
            self.writers.room.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Ranges of a file, cut anywhere, written by two threads of each kind.
        #[test]
        fn ranges_come_out_as_they_were(lens in prop::collection::vec(0usize..30_000, 1..8), size in 1usize..40_000, seed in any::<u32>()) {
            let dir = std::env::temp_dir();
            let path = dir.join(format!("abjure-writer-{}-{seed}", std::process::id()));
            let total: usize = lens.iter().sum();
            let expected: Vec<u8> = (0..total).map(|i| (i * 31 + i / 251) as u8).collect();
            let mut file = Named::create(&path).unwrap();
            file.reserve(total as u64).unwrap();
            let (writers, output) = (Writers::new(6, size), Arc::new(Output::new(file)));
            let mut starts = vec![0];
            starts.extend(lens.iter().scan(0, |at, n| { *at += n; Some(*at) }));
            std::thread::scope(|scope| {
                scope.spawn(|| writers.run());
                scope.spawn(|| writers.run());
                std::thread::scope(|inner| {
                    for half in 0..2 {
                        let (writers, output, starts, expected) = (&writers, &output, &starts, &expected);
                        inner.spawn(move || {
                            for pair in starts.windows(2).skip(half).step_by(2) {
                                let mut sink = Sink::new(writers, output, pair[0] as u64);
                                for piece in expected[pair[0]..pair[1]].chunks(7001) {
                                    sink.write(piece).unwrap();
                                }
                                sink.flush().unwrap();
                            }
                        });
                    }
                });
                output.settle().unwrap();
                writers.close();
            });
            prop_assert!(std::fs::read(&path).unwrap() == expected);
            std::fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn an_error_comes_back() {
        // A file that is open for reading alone.
        let path = std::env::temp_dir().join(format!("abjure-readonly-{}", std::process::id()));
        std::fs::write(&path, [0; 10]).unwrap();
        let output = Arc::new(Output::new(Named::open(&path).unwrap()));
        let writers = Writers::new(2, ALIGN);
        std::thread::scope(|scope| {
            scope.spawn(|| writers.run());
            let mut sink = Sink::new(&writers, &output, 0);
            let written = sink.write(&[1; 20 * ALIGN]).and_then(|()| sink.flush());
            let found = written.and_then(|()| output.settle()).unwrap_err();
            assert!(found.to_string().contains("cannot be written"), "{found}");
            writers.close();
        });
        std::fs::remove_file(&path).unwrap();
    }
}
