//! Files that are whole whenever the program is killed, and a folder that one process writes into at a time.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions, TryLockError},
    io::{BufWriter, Read, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use candle_core::Tensor;
use safetensors::{
    View,
    tensor::{Metadata, TensorInfo},
};
use serde::Serialize;

const PARTIAL: &str = "partial";
const LOCK: &str = ".lock";

/// Writes beside `path` and takes its place, so that what is there is always whole.
pub fn replace(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let partial = path.with_extension(PARTIAL);
    let mut file = BufWriter::with_capacity(1 << 20, File::create(&partial)?);
    write(&mut file)?;
    file.flush()?;
    file.get_ref().sync_all()?;
    Ok(fs::rename(&partial, path)?)
}

/// A line of JSON a value.
pub fn replace_with_lines(path: &Path, values: &[impl Serialize]) -> Result<()> {
    replace(path, |file| {
        for value in values {
            serde_json::to_writer(&mut *file, value)?;
            file.write_all(b"\n")?;
        }
        Ok(())
    })
    .with_context(|| format!("cannot write {}", path.display()))
}

/// Up to 64 bytes of a file. Fails for a [pointer](refuse_pointer).
pub fn beginning(path: &Path) -> Result<Vec<u8>> {
    let mut beginning = Vec::new();
    File::open(path)?.take(64).read_to_end(&mut beginning)?;
    refuse_pointer(&beginning)?;
    Ok(beginning)
}

/// Fails for what a repository holds in place of a large file until that is fetched.
pub fn refuse_pointer(beginning: &[u8]) -> Result<()> {
    ensure!(
        !beginning.starts_with(b"version https://git-lfs"),
        "it is a pointer of git-lfs, not the file itself; `git lfs pull` brings that"
    );
    Ok(())
}

/// Writes tensors as safetensors. The library's own function writes a file of another name first, which a killed program
/// leaves behind, and which only its owner may read.
pub fn write_safetensors(
    out: &mut impl Write,
    tensors: &[(String, Tensor)],
    metadata: HashMap<String, String>,
) -> Result<()> {
    let mut end = 0;
    let infos = tensors.iter().map(|(name, tensor)| {
        let start = end;
        end += View::data_len(tensor);
        let info = TensorInfo {
            dtype: View::dtype(tensor),
            shape: tensor.dims().to_vec(),
            data_offsets: (start, end),
        };
        (name.clone(), info)
    });
    let header = Metadata::new(Some(metadata), infos.collect())?;
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' '); // the data are aligned
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for (_, tensor) in tensors {
        out.write_all(&View::data(tensor))?;
    }
    Ok(())
}

/// A folder for results, which no other process writes into for as long as this value lives.
pub struct Folder(#[expect(dead_code, reason = "closing it gives the lock up")] File);

impl Folder {
    /// Of `--out`, where it is there already.
    pub fn existing(path: &Path) -> Result<Option<Self>> {
        match fs::metadata(path) {
            Err(_) => Ok(None), // or it cannot be made, which is said then
            Ok(found) => {
                ensure!(
                    found.is_dir(),
                    "--out is {}, which is no folder; results, checkpoints and the trained model go into one",
                    path.display()
                );
                Self::make(path).map(Some)
            }
        }
    }

    /// Makes the folder where it is not there, and removes what a killed run had not finished.
    pub fn make(path: &Path) -> Result<Self> {
        fs::create_dir_all(path)
            .with_context(|| format!("cannot make the folder {}", path.display()))?;
        let lock = lock(&path.join(LOCK)).with_context(|| format!("--out {}", path.display()))?;
        remove_stale(path)?;
        Ok(Self(lock))
    }
}

fn lock(path: &Path) -> Result<File> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .context("cannot open its lock")?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            bail!("another process is writing into this folder; wait for it, or choose another")
        }
        Err(TryLockError::Error(error)) => Err(error).context("cannot lock it"),
    }
}

/// What [`replace`] would have put in its place, of checkpoints and of the trained model.
fn remove_stale(folder: &Path) -> Result<()> {
    let mut stale: Vec<PathBuf> = vec![folder.join("model/model.partial")];
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let ours = name.is_some_and(|name| name.starts_with("checkpoint-"));
        if ours && path.extension().is_some_and(|end| end == PARTIAL) {
            stale.push(path);
        }
    }
    for path in stale.iter().filter(|path| path.exists()) {
        fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}
