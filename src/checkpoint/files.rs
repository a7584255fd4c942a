//! Positioned reads and writes whose errors name the file.

use crate::{Error, Result};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::path::{Path, PathBuf};

/// Bytes of one read where nothing else decides.
pub const BLOCK: usize = 1 << 20;
/// What positions in a file and in memory have to be multiples of to be written past the page cache.
pub const ALIGN: usize = 4096;

/// An open file that remembers its name.
#[derive(Debug)]
pub struct Named {
    pub file: File,
    pub path: PathBuf,
    /// The same file, past the page cache.
    direct: Option<File>,
}

impl Named {
    fn of(file: File, path: &Path) -> Self {
        let (path, direct) = (path.to_owned(), None);
        Self { file, path, direct }
    }

    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| reading(path, &e))?;
        if !file.metadata().map_err(|e| reading(path, &e))?.is_file() {
            return Err(Error::checkpoint(path, "expected a regular file"));
        }
        Ok(Self::of(file, path))
    }

    /// A new file; one of that name must not exist.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(|e| writing(path, &e))?;
        Ok(Self::of(file, path))
    }

    /// An existing file, to be changed in place.
    pub fn modify(path: &Path) -> Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|e| writing(path, &e))?;
        Ok(Self::of(file, path))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn size(&self) -> Result<u64> {
        let meta = self.file.metadata().map_err(|e| reading(&self.path, &e))?;
        Ok(meta.len())
    }

    pub fn read_at(&self, at: u64, buffer: &mut [u8]) -> Result<()> {
        read_exact_at(&self.file, at, buffer).map_err(|e| {
            if e.kind() == std::io::ErrorKind::UnexpectedEof {
                let missing = format!("it ends before byte {}", at + buffer.len() as u64);
                return Error::checkpoint(&self.path, format!("truncated: {missing}"));
            }
            reading(&self.path, &e)
        })
    }

    pub fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        write_all_at(&self.file, at, bytes).map_err(|e| writing(&self.path, &e))
    }

    pub fn set_len(&self, len: u64) -> Result<()> {
        self.file.set_len(len).map_err(|e| writing(&self.path, &e))
    }

    /// Gives a new file its length and, where the file system can, its blocks, so that a full disk is found out first
    /// and writers need not wait for each other to extend the file; then [`Named::write_large`] goes past the page cache.
    pub fn reserve(&mut self, len: u64) -> Result<()> {
        #[cfg(target_os = "linux")]
        {
            use rustix::fs::{FallocateFlags, OFlags, fallocate};
            use rustix::io::Errno;
            use std::os::unix::fs::OpenOptionsExt;
            match fallocate(&self.file, FallocateFlags::empty(), 0, len.max(1)) {
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
                Err(e) => return Err(writing(&self.path, &e.into())),
            }
            let flags = OFlags::DIRECT.bits() as i32;
            let open = File::options()
                .write(true)
                .custom_flags(flags)
                .open(&self.path);
            self.direct = open.ok();
        }
        self.set_len(len)
    }

    /// Whether [`Named::write_large`] goes past the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// Writes a large piece. If `bytes` lie in memory as they will in the file, up to multiples of [`ALIGN`], all but
    /// the ends goes to the device without a copy in the page cache, where the file system allows it.
    pub fn write_large(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let head = (at.next_multiple_of(ALIGN as u64) - at) as usize;
        let end =
            ((at + bytes.len() as u64) / ALIGN as u64 * ALIGN as u64).saturating_sub(at) as usize;
        let Some(direct) = self.direct.as_ref().filter(|_| head < end) else {
            return self.write_at(at, bytes);
        };
        if write_all_at(direct, at + head as u64, &bytes[head..end]).is_err() {
            return self.write_at(at, bytes); // as a full disk, this fails too
        }
        self.write_at(at, &bytes[..head])?;
        self.write_at(at + end as u64, &bytes[end..])
    }

    /// Returns once the content is on the storage device.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|e| writing(&self.path, &e))
    }

    /// Makes this (empty) file share the blocks of `source`; false where the file system cannot.
    pub fn share_blocks_of(&self, source: &Self) -> bool {
        #[cfg(target_os = "linux")]
        {
            rustix::fs::ioctl_ficlone(&self.file, &source.file).is_ok()
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = source;
            false
        }
    }

    /// Copies a range of `source` to the same place here without it passing through this process, where the system
    /// can; false if it could not.
    pub fn copy_range_of(&self, source: &Self, at: u64, len: u64) -> bool {
        #[cfg(target_os = "linux")]
        {
            let (mut from, mut to, end) = (at, at, at + len);
            while from < end {
                let len = (end - from).min(1 << 30) as usize;
                let (f, t) = (Some(&mut from), Some(&mut to));
                match rustix::fs::copy_file_range(&source.file, f, &self.file, t, len) {
                    Ok(n) if n > 0 => {}
                    _ => return false,
                }
            }
            true
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = (source, at);
            len == 0
        }
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, at: u64, buffer: &mut [u8]) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, at)
}

#[cfg(unix)]
fn write_all_at(file: &File, at: u64, bytes: &[u8]) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, at)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut at: u64, mut buffer: &mut [u8]) -> std::io::Result<()> {
    while !buffer.is_empty() {
        let n = std::os::windows::fs::FileExt::seek_read(file, buffer, at)?;
        if n == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        at += n as u64;
        buffer = &mut buffer[n..];
    }
    Ok(())
}

#[cfg(windows)]
fn write_all_at(file: &File, mut at: u64, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        let n = std::os::windows::fs::FileExt::seek_write(file, bytes, at)?;
        if n == 0 {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        at += n as u64;
        bytes = &bytes[n..];
    }
    Ok(())
}

/// The error of a read.
pub fn reading(path: &Path, err: &std::io::Error) -> Error {
    Error::checkpoint(path, format!("cannot be read ({err})"))
}

/// The error of a write.
pub fn writing(path: &Path, err: &std::io::Error) -> Error {
    Error::checkpoint(path, format!("cannot be written ({err})"))
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// SHA-256 of a whole file, in hexadecimal digits.
///
/// # Errors
/// `Checkpoint` if it cannot be read.
pub fn sha256_of(path: &Path) -> Result<String> {
    let file = Named::open(path)?;
    let (mut at, len, mut hash) = (0, file.size()?, Sha256::new());
    let mut buffer = vec![0; BLOCK];
    while at < len {
        let n = BLOCK.min((len - at) as usize);
        file.read_at(at, &mut buffer[..n])?;
        hash.update(&buffer[..n]);
        at += n as u64;
    }
    Ok(hex(&hash.finalize()))
}
