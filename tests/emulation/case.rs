//! A case for the emulation's driver: buffers and launches in, the output buffers out.

use std::{fs, path::Path, process::Command};

use bytemuck::Pod;

use crate::kernels::abi::{Kernel, Params};

/// A value that no kernel computes and no tolerance accepts, whatever type reads it.
pub const POISON: u8 = 0x5a;

#[derive(Clone, Copy)]
pub struct Buffer(usize);

impl Buffer {
    /// Address of the buffer's byte `offset`, as the driver understands it.
    pub fn at(self, offset: usize) -> u64 {
        (self.0 as u64 + 1) << 40 | offset as u64
    }

    pub fn start(self) -> u64 {
        self.at(0)
    }
}

struct Contents {
    name: String,
    offset: usize,
    output: bool,
    bytes: Vec<u8>,
}

struct Launch {
    kernel: Kernel,
    params: Params,
    shape: Shape,
}

/// Blocks, threads a block, blocks a cluster, bytes of dynamic shared memory.
#[derive(Clone, Copy)]
pub struct Shape {
    pub grid: u32,
    pub block: u32,
    pub cluster: u32,
    pub dynamic_shared: u32,
}

impl Shape {
    pub fn plain(grid: u32, block: u32) -> Self {
        Self {
            grid,
            block,
            cluster: 1,
            dynamic_shared: 0,
        }
    }
}

pub struct Case {
    seeds: Vec<u64>,
    buffers: Vec<Contents>,
    launches: Vec<Launch>,
}

impl Case {
    pub fn new(seeds: &[u64]) -> Self {
        Self {
            seeds: seeds.to_vec(),
            buffers: Vec::new(),
            launches: Vec::new(),
        }
    }

    /// A buffer that no kernel may change, `offset` bytes after a 16-byte boundary.
    pub fn input<T: Pod>(&mut self, name: &str, values: &[T], offset: usize) -> Buffer {
        self.buffer(name, bytemuck::cast_slice(values).to_vec(), offset, false)
    }

    pub fn output<T: Pod>(&mut self, name: &str, initial: &[T], offset: usize) -> Buffer {
        self.buffer(name, bytemuck::cast_slice(initial).to_vec(), offset, true)
    }

    /// An output of `bytes` bytes, poisoned.
    pub fn poisoned(&mut self, name: &str, bytes: usize, offset: usize) -> Buffer {
        self.buffer(name, vec![POISON; bytes], offset, true)
    }

    fn buffer(&mut self, name: &str, bytes: Vec<u8>, offset: usize, output: bool) -> Buffer {
        self.buffers.push(Contents {
            name: name.into(),
            offset,
            output,
            bytes,
        });
        Buffer(self.buffers.len() - 1)
    }

    pub fn launch(&mut self, kernel: Kernel, params: Params, shape: Shape) {
        self.launches.push(Launch {
            kernel,
            params,
            shape,
        });
    }

    /// What the driver says is wrong, or the outputs.
    pub fn run(&self, driver: &Path) -> Result<Outputs, String> {
        let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
        let (case, result) = (folder.path().join("case"), folder.path().join("result"));
        let paths = folder.path().join("paths");
        fs::write(&case, self.encode()).map_err(|error| error.to_string())?;
        let run = Command::new(driver)
            .arg(&case)
            .arg(&result)
            .env("EMULATION_PATHS", &paths)
            .output()
            .map_err(|error| error.to_string())?;
        if !run.status.success() {
            let said = String::from_utf8_lossy(&run.stderr);
            let beginning: Vec<&str> = said.lines().take(25).collect();
            return Err(format!("{} ({})", beginning.join("\n"), run.status));
        }
        let bytes = fs::read(&result).map_err(|error| error.to_string())?;
        let mut at = 0;
        let buffers = self.buffers.iter().map(|buffer| {
            if !buffer.output {
                return Vec::new();
            }
            at += buffer.bytes.len();
            bytes[at - buffer.bytes.len()..at].to_vec()
        });
        Ok(Outputs {
            buffers: buffers.collect(),
            paths: fs::read_to_string(&paths).map_err(|error| error.to_string())?,
        })
    }

    fn encode(&self) -> Vec<u8> {
        let mut file = Vec::new();
        word(&mut file, self.seeds.len());
        self.seeds
            .iter()
            .for_each(|&seed| file.extend(seed.to_le_bytes()));
        word(&mut file, self.buffers.len());
        for buffer in &self.buffers {
            block(&mut file, buffer.name.as_bytes());
            word(&mut file, buffer.offset);
            word(&mut file, usize::from(buffer.output));
            block(&mut file, &buffer.bytes);
        }
        word(&mut file, self.launches.len());
        for launch in &self.launches {
            block(&mut file, launch.kernel.symbol().as_bytes());
            let shape = launch.shape;
            for value in [shape.grid, shape.block, shape.cluster, shape.dynamic_shared] {
                word(&mut file, value as usize);
            }
            word(&mut file, std::mem::offset_of!(Params, logits_rows) / 8);
            block(&mut file, bytemuck::bytes_of(&launch.params));
        }
        file
    }
}

fn word(file: &mut Vec<u8>, value: usize) {
    file.extend((value as u64).to_le_bytes());
}

fn block(file: &mut Vec<u8>, bytes: &[u8]) {
    word(file, bytes.len());
    file.extend(bytes);
}

pub struct Outputs {
    buffers: Vec<Vec<u8>>,
    /// A line a path through the kernels: whether it was taken, its label and its function.
    pub paths: String,
}

impl Outputs {
    pub fn read<T: Pod>(&self, buffer: Buffer) -> Vec<T> {
        bytemuck::pod_collect_to_vec(&self.buffers[buffer.0])
    }
}
