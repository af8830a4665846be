//! A file of lines that only grows, and that a program killed at any moment leaves repairable.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::samples::object_fields;

/// Lines of JSON objects, locked against other processes for as long as this value lives.
pub struct Log {
    file: File,
    path: PathBuf,
}

impl Log {
    /// Opens the file, or makes it, and reads its lines. A last line that was cut short is removed: it was not counted
    /// yet. Fails when another process has the file open, and when such a line is not the beginning of one of this
    /// program's, as `ours` says.
    pub fn open(path: &Path, ours: impl Fn(&[u8]) -> bool) -> Result<(Self, Vec<String>)> {
        open(path, ours).with_context(|| path.display().to_string())
    }

    /// Returns once the line is on the disk.
    pub fn append(&mut self, line: &str) -> Result<()> {
        self.file
            .write_all(format!("{line}\n").as_bytes())
            .and_then(|()| self.file.sync_data())
            .with_context(|| format!("cannot write {}", self.path.display()))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn open(path: &Path, ours: impl Fn(&[u8]) -> bool) -> Result<(Log, Vec<String>)> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .context("cannot open the file")?;
    match file.try_lock() {
        Ok(()) => (),
        Err(TryLockError::WouldBlock) => bail!("another process is writing this file"),
        Err(TryLockError::Error(e)) => return Err(e).context("cannot lock the file"),
    }
    sync_folder(path).context("cannot make the file durable")?;

    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)
        .context("cannot read the file")?;
    let whole = bytes
        .iter()
        .rposition(|&byte| byte == b'\n')
        .map_or(0, |at| at + 1);
    repair(&mut file, &mut bytes, whole, ours).context("cannot repair the last line")?;
    file.seek(SeekFrom::End(0))
        .context("cannot read the file")?;

    let text = String::from_utf8(bytes).context("the file is not UTF-8")?;
    let lines = text.lines().map(str::to_string).collect();
    Ok((
        Log {
            file,
            path: path.to_path_buf(),
        },
        lines,
    ))
}

/// Ends a last line that lacks its line break only, and removes one that was cut elsewhere. After a power failure a file
/// can also end in zeros.
fn repair(
    file: &mut File,
    bytes: &mut Vec<u8>,
    whole: usize,
    ours: impl Fn(&[u8]) -> bool,
) -> Result<()> {
    let last = &bytes[whole..];
    if last.is_empty() {
        return Ok(());
    }
    let complete = std::str::from_utf8(last).is_ok_and(|line| object_fields(line).is_ok());
    if complete {
        file.write_all(b"\n")?;
    } else if ours(last) || last.iter().all(|&byte| byte == 0) {
        file.set_len(whole as u64)?;
        bytes.truncate(whole);
    } else {
        bail!("it is not this program's, so neither is the file; choose another --out");
    }
    Ok(file.sync_all()?)
}

/// A file that was made just now is found again after a power failure only once its folder is on the disk.
#[cfg(unix)]
fn sync_folder(path: &Path) -> std::io::Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(not(unix))]
fn sync_folder(_: &Path) -> std::io::Result<()> {
    Ok(())
}
