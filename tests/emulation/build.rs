//! Compiles the kernels with the emulation, once for each set of sources.

use std::{
    fs,
    hash::{DefaultHasher, Hasher},
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, OnceLock},
};

/// What is compiled in, because each sees what the others miss. See `kernels/emulation/README.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Build {
    Plain,
    /// AddressSanitizer and UndefinedBehaviorSanitizer.
    Sanitized,
    /// Every access of the kernels goes to the emulation's race detector.
    Races,
}

impl Build {
    /// For the kernels, and for the rest.
    fn flags(self) -> [&'static [&'static str]; 2] {
        const SANITIZE: &[&str] = &[
            "-O1",
            "-g1",
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=all",
        ];
        match self {
            Self::Plain => [&["-O2"], &["-O1"]],
            Self::Sanitized => [SANITIZE, SANITIZE],
            Self::Races => [&["-O1", "-fsanitize=thread"], &["-O2", "-DEMULATE_RACES"]],
        }
    }

    /// For mutants of the kernels, which run little: most of their time is the compiler's.
    fn quick_flags(self) -> &'static [&'static str] {
        match self {
            Self::Plain => &["-O0"],
            Self::Sanitized => &["-O0", "-g1", "-fsanitize=address"],
            Self::Races => &["-O0", "-fsanitize=thread"],
        }
    }

    /// Without libtsan: its hooks are the emulation's own.
    fn link_flags(self) -> &'static [&'static str] {
        match self {
            Self::Sanitized => &["-fsanitize=address,undefined"],
            Self::Plain | Self::Races => &[],
        }
    }
}

const COMMON_FLAGS: &[&str] = &[
    "-std=c++20",
    "-DEMULATE_CUDA",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    // Kernels read a row's bytes as words, as nvcc lets them.
    "-fno-strict-aliasing",
    // Only `dev::fma` fuses, on every machine.
    "-ffp-contract=off",
];

pub fn kernel_sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

/// The driver of the kernels as they are.
pub fn driver(build: Build) -> &'static Path {
    static DRIVERS: [OnceLock<PathBuf>; 3] = [const { OnceLock::new() }; 3];
    let [kernel_flags, flags] = build.flags();
    DRIVERS[build as usize].get_or_init(|| {
        let kernels = object(&kernel_sources(), "kernels.cpp", build, kernel_flags);
        let driver = object(&kernel_sources(), "driver.cpp", build, flags);
        link("driver", [kernels, driver], build).unwrap_or_else(|error| panic!("{error}"))
    })
}

/// The driver of kernels changed in `sources`, a copy of `kernels/`.
pub fn mutant_driver(sources: &Path, build: Build) -> PathBuf {
    let [_, flags] = build.flags();
    let kernels = object(sources, "kernels.cpp", build, build.quick_flags());
    let driver = object(&kernel_sources(), "driver.cpp", build, flags);
    link("mutant", [kernels, driver], build).unwrap_or_else(|error| panic!("{error}"))
}

/// The emulation's test of itself.
pub fn self_test(build: Build) -> &'static Path {
    static PROGRAMS: [OnceLock<PathBuf>; 3] = [const { OnceLock::new() }; 3];
    let [kernel_flags, _] = build.flags();
    PROGRAMS[build as usize].get_or_init(|| {
        let test = object(&kernel_sources(), "self_test.cpp", build, kernel_flags);
        link("self_test", [test], build).unwrap_or_else(|error| panic!("{error}"))
    })
}

/// With the runtime.
fn link<const N: usize>(
    name: &str,
    objects: [Result<PathBuf, String>; N],
    build: Build,
) -> Result<PathBuf, String> {
    let mut objects = objects.into_iter().collect::<Result<Vec<_>, _>>()?;
    objects.push(object(
        &kernel_sources(),
        "runtime.cpp",
        build,
        build.flags()[1],
    )?);
    let mut hasher = DefaultHasher::new();
    objects
        .iter()
        .for_each(|object| hasher.write(object.as_os_str().as_encoded_bytes()));
    cached(&format!("{name}-{:016x}", hasher.finish()), |output| {
        let mut link = Command::new(compiler());
        link.args(build.link_flags())
            .args(&objects)
            .arg("-o")
            .arg(output);
        link
    })
}

/// Compiled only when the sources, the flags or the compiler's name differ from those of an earlier run.
fn object(sources: &Path, file: &str, build: Build, flags: &[&str]) -> Result<PathBuf, String> {
    let mut hasher = DefaultHasher::new();
    let mut files = Vec::new();
    for folder in [sources.to_path_buf(), sources.join("emulation")] {
        let entries =
            fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        files.extend(
            entries
                .map(|entry| entry.expect("a readable folder").path())
                .filter(|path| path.is_file()),
        );
    }
    files.sort();
    // Headers, and the file itself; the kernels' sources belong to kernels.cpp.
    let in_kernels = file == "kernels.cpp";
    files.retain(
        |path| match path.extension().and_then(|extension| extension.to_str()) {
            Some("h") => true,
            Some("cu" | "cuh") => in_kernels || path.ends_with("params.cuh"),
            _ => path.ends_with(file),
        },
    );
    for path in &files {
        hasher.write(path.file_name().expect("a file").as_encoded_bytes());
        hasher.write(&fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?);
    }
    hasher.write(format!("{} {COMMON_FLAGS:?} {flags:?}", compiler()).as_bytes());
    let name = format!(
        "{}-{build:?}-{:016x}.o",
        file.trim_end_matches(".cpp"),
        hasher.finish()
    );
    cached(&name, |output| {
        let mut compile = Command::new(compiler());
        compile
            .args(COMMON_FLAGS)
            .args(flags)
            .arg("-c")
            .arg(sources.join("emulation").join(file));
        compile.arg("-o").arg(output);
        compile
    })
}

fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "g++".into())
}

/// Runs `command` for a temporary name that is then moved, so that no other process sees half a file.
fn cached(name: &str, command: impl FnOnce(&Path) -> Command) -> Result<PathBuf, String> {
    static NAMES: Mutex<Vec<(String, &'static Mutex<()>)>> = Mutex::new(Vec::new());
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulation");
    fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let path = folder.join(name);
    let lock = {
        let mut names = NAMES.lock().expect("no panic under this lock");
        match names.iter().find(|(known, _)| known == name) {
            Some((_, lock)) => *lock,
            None => {
                let lock: &'static Mutex<()> = Box::leak(Box::new(Mutex::new(())));
                names.push((name.to_owned(), lock));
                lock
            }
        }
    };
    let _one_at_a_time = lock.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if path.exists() {
        return Ok(path);
    }
    let temporary = folder.join(format!("{name}.{}", std::process::id()));
    let mut command = command(&temporary);
    let output = command.output().map_err(|error| {
        format!(
            "the kernel tests need a C++20 compiler: cannot run {} ($CXX, else g++): {error}",
            compiler()
        )
    })?;
    if !output.status.success() {
        return Err(format!(
            "{command:?} failed:\n{}",
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    fs::rename(&temporary, &path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(path)
}

/// On some code pages MSVC, nvcc's host compiler on Windows, takes a line's end for the second half of a character.
#[test]
fn kernels_are_ascii() {
    for entry in fs::read_dir(kernel_sources()).expect("the kernels' folder") {
        let path = entry.expect("a readable folder").path();
        if path.is_file() {
            let source = fs::read_to_string(&path).expect("a kernel source");
            let foreign = source.lines().position(|line| !line.is_ascii());
            assert_eq!(foreign, None, "{}: line, from 0", path.display());
        }
    }
}
