//! The kernels' texts, put together for CUDA or Metal.

use std::fmt::Write as _;

use mlx_ext::{Kernel, Language, Source};
use mlx_rs::Dtype;

use super::{Made, unfit};

/// A kernel's text, common to both languages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Body {
    Project,
    Attend,
    Merge,
}

impl Body {
    fn text(self) -> &'static str {
        match self {
            Self::Project => include_str!("source/project.kernel"),
            Self::Attend => include_str!("source/attend.kernel"),
            Self::Merge => include_str!("source/merge.kernel"),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Project => "project",
            Self::Attend => "attend",
            Self::Merge => "merge",
        }
    }
}

/// The constants of a kernel, in the order in which they were given.
#[derive(Debug, Clone, Default)]
pub(super) struct Defines(String);

impl Defines {
    pub(super) fn set(&mut self, name: &str, value: impl std::fmt::Display) -> &mut Self {
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "#define {name} {value}");
        self
    }

    pub(super) fn flag(&mut self, name: &str, value: bool) -> &mut Self {
        self.set(name, i32::from(value))
    }

    /// All digits, and the mark of a float.
    pub(super) fn float(&mut self, name: &str, value: f64) -> &mut Self {
        self.set(name, format_args!("{value:e}f"))
    }
}

/// The text before a kernel and the one inside it.
pub(super) fn texts(
    language: Language,
    body: Body,
    defines: &Defines,
    dtype: Dtype,
) -> Made<(String, String)> {
    let (prelude, begin) = match language {
        Language::Cuda => (include_str!("source/prelude.cu"), include_str!("source/begin.cu")),
        Language::Metal => (
            include_str!("source/prelude.metal"),
            include_str!("source/begin.metal"),
        ),
    };
    let element = match (dtype, language) {
        (Dtype::Float32, _) => "float",
        (Dtype::Float16, Language::Cuda) => "__half",
        (Dtype::Float16, Language::Metal) => "half",
        (Dtype::Bfloat16, Language::Cuda) => "__nv_bfloat16",
        (Dtype::Bfloat16, Language::Metal) => "bfloat16_t",
        _ => return Err(unfit(format!("no kernels for {dtype:?}"))),
    };
    let mut header = defines.0.clone();
    let _ = writeln!(header, "typedef {element} elem;");
    for text in [prelude, include_str!("source/shared.kernel")] {
        bare(text, &mut header);
    }
    if body == Body::Project {
        bare(include_str!("source/weights.kernel"), &mut header);
    }
    let mut inside = String::new();
    bare(begin, &mut inside);
    bare(body.text(), &mut inside);
    Ok((header, inside))
}

/// A kernel for the default device. `name` is to be different for different constants.
pub(super) fn kernel(
    body: Body,
    name: &str,
    defines: &Defines,
    dtype: Dtype,
    inputs: &[&str],
    outputs: &[&str],
) -> Made<Kernel> {
    let language = Language::of_device()?.ok_or_else(|| unfit("no kernels for the CPU"))?;
    let (header, inside) = texts(language, body, defines, dtype)?;
    Ok(Kernel::new(&Source {
        name: &format!("{}_{name}", body.name()),
        inputs,
        outputs,
        header: &header,
        body: &inside,
    })?)
}

/// Appends `text` without comments and indentation: MLX takes a hash of the whole text each time a kernel runs.
fn bare(text: &str, to: &mut String) {
    for line in text.lines() {
        let code = line.split_once("//").map_or(line, |(code, _)| code).trim();
        if !code.is_empty() {
            to.push_str(code);
            to.push('\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_bare_and_in_order() {
        for language in [Language::Cuda, Language::Metal] {
            for body in [Body::Project, Body::Attend, Body::Merge] {
                let mut defines = Defines::default();
                defines.set("WARPS", 8).flag("NORM", true).float("EPSILON", 1e-6);
                let (header, inside) = texts(language, body, &defines, Dtype::Bfloat16).unwrap();
                assert!(header.starts_with("#define WARPS 8\n#define NORM 1\n#define EPSILON 1e-6f\n"));
                assert!(header.contains(" elem;\n"));
                assert_eq!(header.contains("struct Weights"), body == Body::Project);
                for text in [&header, &inside] {
                    assert!(!text.contains("//") && !text.contains("\n ") && !text.contains("\n\n"));
                    let braces = |c| text.matches(c).count();
                    assert_eq!(braces('('), braces(')'));
                }
                // Words of one language must not stand in the other's text.
                let foreign = match language {
                    Language::Cuda => ["threadgroup", "simd_"],
                    Language::Metal => ["__shared__", "threadIdx"],
                };
                for word in foreign {
                    assert!(!header.contains(word) && !inside.contains(word), "{word}");
                }
            }
        }
        assert!(texts(Language::Cuda, Body::Merge, &Defines::default(), Dtype::Int32).is_err());
    }
}
