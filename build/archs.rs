//! Which GPU architectures to compile for, and by which nvcc. A test target too, as build scripts have none.

/// One architecture, such as sm_80 or sm_90a.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Arch {
    pub number: u32,
    /// "", "a" (features of exactly this chip) or "f" (of its family).
    pub suffix: &'static str,
}

/// Compiled where no list is given and no GPU is seen: code for one chip also runs on later ones of its major version.
pub const DEFAULT: [u32; 5] = [75, 80, 90, 100, 120];

/// Reads a list such as `80;90`, in which `8.0` and `sm_80` are accepted for `80`. The result is sorted.
pub fn parse_list(list: &str) -> Result<Vec<Arch>, String> {
    let items = list
        .split([';', ',', ' ', '\n'])
        .map(str::trim)
        .filter(|item| !item.is_empty());
    let mut archs = items.map(parse).collect::<Result<Vec<_>, _>>()?;
    archs.sort();
    archs.dedup();
    if archs.is_empty() {
        Err("an empty list".into())
    } else {
        Ok(archs)
    }
}

fn parse(item: &str) -> Result<Arch, String> {
    let body = item.strip_prefix("sm_").unwrap_or(item);
    let digits = body.trim_end_matches(['a', 'f']);
    let suffix = match &body[digits.len()..] {
        "" => "",
        "a" => "a",
        "f" => "f",
        _ => return Err(format!("`{item}` is no architecture")),
    };
    // Major and minor version, the minor one digit: two or three digits in all.
    let number = digits.replacen('.', "", 1);
    match number.parse() {
        Ok(number) if (50..1000).contains(&number) => Ok(Arch { number, suffix }),
        _ => Err(format!("`{item}` is no architecture")),
    }
}

/// Says so if nvcc does not know one of them. `known` is what `nvcc --list-gpu-code` prints.
pub fn check(archs: &[Arch], known: &str) -> Result<(), String> {
    let known = numbers(known);
    match archs.iter().find(|arch| !known.contains(&arch.number)) {
        None => Ok(()),
        Some(arch) => {
            let known: Vec<_> = known.iter().map(u32::to_string).collect();
            Err(format!(
                "sm_{}{} is unknown to this nvcc, which knows {}",
                arch.number,
                arch.suffix,
                known.join(", ")
            ))
        }
    }
}

/// [`DEFAULT`], as far as nvcc knows it.
pub fn default_list(known: &str) -> Vec<Arch> {
    let known = numbers(known);
    DEFAULT
        .into_iter()
        .filter(|n| known.contains(n))
        .map(|number| Arch { number, suffix: "" })
        .collect()
}

fn numbers(known: &str) -> Vec<u32> {
    let mut numbers: Vec<u32> = known
        .split_whitespace()
        .filter_map(|code| code.strip_prefix("sm_")?.parse().ok())
        .collect();
    numbers.sort();
    numbers
}

/// nvcc's arguments: machine code for each, and PTX, which other GPUs compile when they load it. That of the lowest
/// serves those in between; newer ones take that of the highest, as only PTX from 90 on has the on-chip kernels. It has
/// no suffix, since code with one runs on no other chip.
pub fn gencode(archs: &[Arch]) -> Vec<String> {
    let code = |a: &Arch| {
        format!(
            "-gencode=arch=compute_{0}{1},code=sm_{0}{1}",
            a.number, a.suffix
        )
    };
    let numbers = || archs.iter().map(|a| a.number);
    let lowest = numbers().min();
    let highest = numbers().max().filter(|&n| Some(n) != lowest);
    let ptx = |n: u32| format!("-gencode=arch=compute_{n},code=compute_{n}");
    let ptx = lowest.into_iter().chain(highest).map(ptx);
    archs.iter().map(code).chain(ptx).collect()
}

/// `80;90`, as it would be given.
pub fn display(archs: &[Arch]) -> String {
    archs
        .iter()
        .map(|a| format!("{}{}", a.number, a.suffix))
        .collect::<Vec<_>>()
        .join(";")
}

/// The first CUDA whose ptxas compiles the kernels with line information; 12.0's crashes at sm_90.
pub const OLDEST_CUDA: (u32, u32) = (12, 1);

/// Says so if nvcc is too old. `version` is what `nvcc --version` prints.
pub fn check_version(version: &str) -> Result<(), String> {
    let found = version
        .split("release ")
        .nth(1)
        .and_then(|rest| rest.split(',').next()?.split_once('.'))
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    let (major, minor) = OLDEST_CUDA;
    match found {
        Some(found) if found < OLDEST_CUDA => Err(format!(
            "nvcc is of CUDA {}.{}, which cannot compile the kernels: install CUDA {major}.{minor} or newer and put its \
             bin folder first on PATH (or set CUDA_HOME, or NVCC)",
            found.0, found.1
        )),
        // What says it otherwise may do.
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &str = "sm_75\nsm_80\nsm_86\nsm_90\nsm_100\nsm_120\n";

    #[test]
    fn lists_are_read_sorted_and_without_repeats() {
        for list in ["80;90a", "90a,80", " sm_90a 8.0 80 ", "8.0\n9.0a\n"] {
            assert_eq!(display(&parse_list(list).unwrap()), "80;90a", "{list}");
        }
        assert_eq!(
            display(&parse_list("120;12.1f;100a").unwrap()),
            "100a;120;121f"
        );
    }

    #[test]
    fn what_is_no_list_is_named() {
        for (list, part) in [
            ("", "empty"),
            (" ; ", "empty"),
            ("80;ampere", "ampere"),
            ("9", "`9`"),
            ("90af", "90af"),
            ("-80", "-80"),
        ] {
            let message = parse_list(list).unwrap_err();
            assert!(message.contains(part), "{list}: {message}");
        }
    }

    #[test]
    fn an_unknown_architecture_is_named_beside_the_known_ones() {
        assert_eq!(check(&parse_list("75;90a;120f").unwrap(), KNOWN), Ok(()));
        let message = check(&parse_list("80;91").unwrap(), KNOWN).unwrap_err();
        assert!(
            message.contains("sm_91") && message.contains("86, 90, 100"),
            "{message}"
        );
    }

    #[test]
    fn machine_code_for_each_and_ptx_of_the_lowest_and_the_highest() {
        // PTX for 90a would run on Hopper alone.
        assert_eq!(
            gencode(&parse_list("90a;80;86").unwrap()),
            [
                "-gencode=arch=compute_80,code=sm_80",
                "-gencode=arch=compute_86,code=sm_86",
                "-gencode=arch=compute_90a,code=sm_90a",
                "-gencode=arch=compute_80,code=compute_80",
                "-gencode=arch=compute_90,code=compute_90",
            ]
        );
        assert_eq!(
            gencode(&parse_list("90").unwrap()),
            [
                "-gencode=arch=compute_90,code=sm_90",
                "-gencode=arch=compute_90,code=compute_90",
            ]
        );
    }

    /// As nvcc before 12.8 knows neither 100 nor 120.
    #[test]
    fn the_default_has_ptx_with_clusters_whatever_nvcc_knows() {
        for known in [KNOWN, "sm_75\nsm_80\nsm_90\nsm_90a\n"] {
            let highest = gencode(&default_list(known)).pop().unwrap();
            let (_, ptx) = highest.split_once("code=compute_").unwrap();
            assert!(ptx.parse::<u32>().unwrap() >= 90, "{highest}");
        }
    }

    #[test]
    fn an_nvcc_whose_assembler_crashes_is_refused() {
        let printed = |release: &str| {
            format!(
                "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release {release}\nBuild cuda\n"
            )
        };
        for release in ["12.1, V12.1.66", "12.10, V12.10.1", "13.0, V13.0.88"] {
            assert_eq!(check_version(&printed(release)), Ok(()), "{release}");
        }
        for (release, name) in [("12.0, V12.0.140", "12.0"), ("11.8, V11.8.89", "11.8")] {
            let message = check_version(&printed(release)).unwrap_err();
            assert!(
                message.contains(name) && message.contains("12.1 or newer"),
                "{message}"
            );
            assert!(!message.contains('\n'), "{message}");
        }
        assert_eq!(check_version("clang version 20.1.0"), Ok(()));
    }

    #[test]
    fn the_default_leaves_out_what_nvcc_does_not_know() {
        assert_eq!(display(&default_list(KNOWN)), "75;80;90;100;120");
        assert_eq!(display(&default_list("sm_80\nsm_90\n")), "80;90");
    }
}
