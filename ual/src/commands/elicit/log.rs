//! A file of lines that only grows, and that a program killed at any moment leaves repairable.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};

use serde_json::{Map, Value};

/// Lines of JSON objects, locked against other processes for as long as this value lives.
pub struct Log {
    file: File,
    path: PathBuf,
    /// Where whole lines end, and what is there of another.
    whole: u64,
    torn: Vec<u8>,
}

impl Log {
    /// Opens the file, or makes it, and reads its lines, of which the last may lack its line break. To be
    /// [repaired](Self::repair) before anything is appended. Fails when another process has the file open.
    pub fn open(path: &Path) -> Result<(Self, Vec<String>)> {
        open(path).with_context(|| path.display().to_string())
    }

    /// Ends a last line that lacks its line break only, and removes one that was cut elsewhere, as it was not counted yet.
    /// After a power failure a file can also end in zeros. Fails where there is no whole line, and what there is of
    /// one does not agree with any of `beginnings`, of this program's lines.
    pub fn repair<'a>(&mut self, beginnings: impl IntoIterator<Item = &'a str>) -> Result<()> {
        if self.torn.is_empty() {
            return Ok(());
        }
        let text = self.torn.iter().rposition(|&byte| byte != 0);
        let text = &self.torn[..text.map_or(0, |last| last + 1)];
        let agrees = |beginning: &str| {
            let length = beginning.len().min(text.len());
            beginning.as_bytes()[..length] == text[..length]
        };
        let repaired = if is_object(text) && text.len() == self.torn.len() {
            self.file.write_all(b"\n")
        } else if self.whole > 0 || beginnings.into_iter().any(agrees) {
            let end = SeekFrom::Start(self.whole);
            let cut = self.file.set_len(self.whole);
            cut.and_then(|()| self.file.seek(end).map(drop))
        } else {
            bail!(
                "{}: what is there is not this program's; choose another --out",
                self.path.display()
            );
        };
        self.torn.clear();
        repaired
            .and_then(|()| self.file.sync_all())
            .with_context(|| format!("cannot repair {}", self.path.display()))
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

fn open(path: &Path) -> Result<(Log, Vec<String>)> {
    // A pipe, say, would be read without an end.
    if let Ok(found) = fs::metadata(path) {
        ensure!(
            found.is_file(),
            "it is {}; answers are appended to a file, and read from it when the program goes on",
            if found.is_dir() {
                "a folder"
            } else {
                "no regular file"
            }
        );
    }
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
    let last_break = bytes.iter().rposition(|&byte| byte == b'\n');
    let torn = bytes.split_off(last_break.map_or(0, |at| at + 1));
    let text = String::from_utf8(bytes).context("the file is not UTF-8")?;
    let mut lines: Vec<String> = text.lines().map(str::to_string).collect();
    if is_object(&torn) {
        lines.push(String::from_utf8_lossy(&torn).into_owned());
    }
    Ok((
        Log {
            file,
            path: path.to_path_buf(),
            whole: text.len() as u64,
            torn,
        },
        lines,
    ))
}

fn is_object(line: &[u8]) -> bool {
    std::str::from_utf8(line)
        .is_ok_and(|line| serde_json::from_str::<Map<String, Value>>(line).is_ok())
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
