//! With the feature `cuda`, compiles kernels/cross_entropy.cu into a fatbin that the library embeds.

mod build {
    pub mod archs;
}

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, exit},
};

use build::archs::{self, Arch};

const ARCHS: &str = "CANDLE_CROSS_ENTROPY_CUDA_ARCHS";
const KERNEL: &str = "kernels/cross_entropy.cu";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build/archs.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    if let Err(message) = compile() {
        // One line: cargo shows it below the name of this crate, and a backtrace would bury it.
        println!("cargo::error={message}");
        exit(1);
    }
}

fn compile() -> Result<(), String> {
    // nvcc itself reads the last three.
    for name in [
        ARCHS,
        "CUDA_COMPUTE_CAP",
        "NVCC",
        "CUDA_HOME",
        "CUDA_PATH",
        "NVCC_CCBIN",
        "NVCC_PREPEND_FLAGS",
        "NVCC_APPEND_FLAGS",
    ] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    for file in std::fs::read_dir("kernels").map_err(|e| format!("kernels: {e}"))? {
        let path = file.map_err(|e| format!("kernels: {e}"))?.path();
        if path.extension().is_some_and(|e| e == "cu" || e == "cuh") {
            println!("cargo::rerun-if-changed={}", path.display());
        }
    }
    let nvcc = find_nvcc().ok_or(
        "feature `cuda` needs nvcc, which was not found: install the CUDA toolkit 12.1 or newer and put its bin folder on \
         PATH (or set CUDA_HOME, or NVCC), or build without the feature",
    )?;
    println!("cargo::rerun-if-changed={}", nvcc.display());

    archs::check_version(&output(Command::new(&nvcc).arg("--version"))?)?;
    let known = output(Command::new(&nvcc).arg("--list-gpu-code"))?;
    let archs = requested(&known)?;
    let fatbin =
        Path::new(&env::var_os("OUT_DIR").expect("set by cargo")).join("cross_entropy.fatbin");
    // -lineinfo names source lines in profilers and compute-sanitizer, and changes no code.
    let mut command = Command::new(&nvcc);
    command
        .args(["-fatbin", "-O3", "-std=c++17", "-lineinfo", "--threads=0"])
        .args(archs::gencode(&archs));
    output(command.arg("-o").arg(&fatbin).arg(KERNEL))?;
    println!(
        "cargo::rustc-env=CROSS_ENTROPY_ARCHS={}",
        archs::display(&archs)
    );
    Ok(())
}

/// The list in the environment, else the architecture that candle's kernels are compiled for, else this machine's
/// GPUs', else a list for most.
fn requested(known: &str) -> Result<Vec<Arch>, String> {
    for name in [ARCHS, "CUDA_COMPUTE_CAP"] {
        if let Ok(list) = env::var(name) {
            let checked = archs::parse_list(&list)
                .and_then(|archs| archs::check(&archs, known).map(|()| archs));
            return checked.map_err(|e| format!("{name}={list}: {e}; give a list such as 80;90"));
        }
    }
    let smi = output(
        Command::new("nvidia-smi").args(["--query-gpu=compute_cap", "--format=csv,noheader"]),
    );
    if let Some(archs) = smi.ok().and_then(|caps| archs::parse_list(&caps).ok()) {
        return archs::check(&archs, known)
            .map(|()| archs)
            .map_err(|e| format!("this machine's GPU: {e}; use a newer toolkit, or set {ARCHS} to a lower architecture"));
    }
    Ok(archs::default_list(known))
}

fn find_nvcc() -> Option<PathBuf> {
    if let Some(nvcc) = env::var_os("NVCC") {
        return Some(nvcc.into());
    }
    let name = format!("nvcc{}", env::consts::EXE_SUFFIX);
    let homes = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(env::var_os)
        .map(|home| Path::new(&home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = homes
        .chain(env::split_paths(&path))
        .chain([PathBuf::from("/usr/local/cuda/bin")]);
    folders
        .map(|folder| folder.join(&name))
        .find(|nvcc| nvcc.is_file())
}

/// What the command printed, or why there is nothing. nvcc's own messages follow it to stderr, which cargo shows.
fn output(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|e| format!("{program}: {e}"))?;
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!(
            "{program} failed ({}); its messages are below",
            output.status
        ))
    }
}
