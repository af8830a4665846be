//! SHA-256 of files and of bytes.

use std::{fs::File, io::Read, path::Path};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn of_bytes(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Of the files' bytes, one file after another.
pub fn of_files(files: &[impl AsRef<Path>]) -> Result<String> {
    let mut hash = Sha256::new();
    let mut block = vec![0; 1 << 20];
    for path in files.iter().map(AsRef::as_ref) {
        let mut file = File::open(path).with_context(|| path.display().to_string())?;
        loop {
            match file.read(&mut block)? {
                0 => break,
                length => hash.update(&block[..length]),
            }
        }
    }
    Ok(hex(&hash.finalize()))
}
