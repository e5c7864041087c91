//! Products of a few rows with a weight matrix, and what surrounds them.

use mlx_ext::{Kernel, Language, Launch};
use mlx_rs::error::{Exception, Result};
use mlx_rs::{Array, Dtype};

use super::source::{Body, Defines, kernel};
use super::{Made, unfit};
use crate::model::layers::Matrix;

/// Warps of a group.
const WARPS: i32 = 8;
const ROUTER_WARPS: i32 = 16;

/// How the numbers of a matrix are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Packing {
    /// 0: plain.
    bits: i32,
    group: i32,
}

impl Packing {
    fn of(matrix: &Matrix) -> Made<Self> {
        match matrix {
            Matrix::Plain(_) => Ok(Self { bits: 0, group: 64 }),
            Matrix::Quantised { affine, .. } if matches!(affine.bits, 4 | 8) => Ok(Self {
                bits: affine.bits,
                group: affine.group,
            }),
            Matrix::Quantised { affine, .. } => Err(unfit(format!("no kernels for {} bits", affine.bits))),
        }
    }

    /// Neighbouring weights that a lane reads at a time: 16 bytes of half or packed precision.
    fn span(self) -> i32 {
        match self.bits {
            4 => 32,
            8 => 16,
            _ => 8,
        }
    }
}

/// The arrays of a matrix, in the order of the kernel's inputs.
pub(super) fn arrays(matrix: &Matrix) -> Vec<&Array> {
    match matrix {
        Matrix::Plain(weight) => vec![weight],
        Matrix::Quantised {
            packed,
            scales,
            biases,
            ..
        } => vec![packed, scales, biases],
    }
}

/// `[outputs, inputs]` of a matrix, or of each of a stack.
fn shape(matrix: &Matrix) -> Made<(i32, i32)> {
    let (array, per) = match matrix {
        Matrix::Plain(weight) => (weight, 1),
        Matrix::Quantised { packed, affine, .. } => (packed, 32 / affine.bits.clamp(1, 32)),
    };
    match array.shape() {
        [.., outputs, inputs] => Ok((*outputs, inputs * per)),
        other => Err(unfit(format!("a matrix of shape {other:?}"))),
    }
}

/// What a product is part of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Role {
    /// Of the normalised input; the matrices' results side by side.
    Normalised { eps: f32 },
    /// Added to a residual.
    Added,
    /// `silu(first) * second` of the normalised input.
    Gated { eps: f32 },
    /// Scores of experts: the best `choices` and their shares.
    Router { eps: f32, choices: i32, normalise: bool },
    /// As `Gated`, with each token's chosen experts: a row a choice.
    Routed { eps: f32, choices: i32 },
    /// The choices' results times their shares, added to a residual.
    Mixed { choices: i32 },
}

/// One product: a kernel for one row, and for as many as the device's group memory holds at a time.
#[derive(Debug)]
pub(super) struct Project {
    variants: Vec<(i32, Kernel)>,
    role: Role,
    outputs: i32,
    /// Outputs of a group.
    per_group: Vec<i32>,
    threads: i32,
    dtype: Dtype,
}

impl Project {
    /// For matrices of one kind with the same inputs; `name` is the product's own.
    pub(super) fn new(name: &str, role: Role, matrices: &[&Matrix], dtype: Dtype) -> Made<Self> {
        let language = Language::of_device()?.ok_or_else(|| unfit("no kernels for the CPU"))?;
        let [first, others @ ..] = matrices else {
            return Err(unfit("a product without a matrix"));
        };
        let packing = Packing::of(first)?;
        let (first_outputs, width) = shape(first)?;
        let mut parts = vec![first_outputs];
        for matrix in others {
            let (outputs, inputs) = shape(matrix)?;
            if Packing::of(matrix)? != packing || inputs != width {
                return Err(unfit(format!("{name}: matrices of different kinds")));
            }
            parts.push(outputs);
        }
        if matrices.iter().any(|matrix| matrix.dtype() != dtype) {
            return Err(unfit(format!("{name}: weights of another type than {dtype:?}")));
        }
        let span = packing.span();
        let single = matches!(
            role,
            Role::Router { .. } | Role::Routed { .. } | Role::Mixed { .. }
        );
        let gated = matches!(role, Role::Gated { .. } | Role::Routed { .. });
        let inputs = match role {
            Role::Mixed { choices } => width * choices,
            _ => width,
        };
        if width % span != 0 || inputs % 4 != 0 || (gated && parts != [first_outputs, first_outputs]) {
            return Err(unfit(format!(
                "{name}: no kernel for {parts:?} outputs of {width} inputs"
            )));
        }
        let outputs = if gated { first_outputs } else { parts.iter().sum() };
        let most_rows: &[i32] = match (single, language) {
            (true, _) => &[1],
            (false, Language::Cuda) => &[1, 4, 8],
            // Group memory is smaller there.
            (false, Language::Metal) => &[1, 2, 4],
        };
        let warps = if matches!(role, Role::Router { .. }) {
            ROUTER_WARPS
        } else {
            WARPS
        };
        let mut variants = Vec::with_capacity(most_rows.len());
        let mut per_group = Vec::with_capacity(most_rows.len());
        for &rows in most_rows {
            let plan = Plan::new(role, rows, inputs, outputs, packing, language);
            let mut defines = Defines::default();
            plan.define(&mut defines, role, packing, &parts, inputs, outputs, width);
            defines.set("ROWS", rows).set("WARPS", warps);
            let names = input_names(role, &parts, packing);
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let results: &[&str] = match role {
                Role::Router { .. } => &["chosen", "shares"],
                _ => &["out"],
            };
            let made = kernel(
                Body::Project,
                &format!("{name}_{rows}"),
                &defines,
                dtype,
                &names,
                results,
            )?;
            variants.push((rows, made));
            per_group.push(plan.outs_of_warp(gated) * warps);
        }
        Ok(Self {
            variants,
            role,
            outputs,
            per_group,
            threads: warps * 32,
            dtype,
        })
    }

    /// The kernel's results for `rows` rows; `inputs` in the order of the role's inputs.
    pub(super) fn apply(&self, inputs: &[&Array], rows: i32) -> Result<Vec<Array>> {
        let fitting = self.variants.iter().position(|(most, _)| *most >= rows);
        let index = fitting.unwrap_or(self.variants.len().saturating_sub(1));
        let (Some((most, kernel)), Some(per_group)) = (self.variants.get(index), self.per_group.get(index))
        else {
            return Err(Exception::custom("a product without a kernel"));
        };
        let pairs = match self.role {
            Role::Routed { choices, .. } => rows * choices,
            _ => rows,
        };
        let outputs = match self.role {
            Role::Router { choices, .. } => vec![
                (vec![rows, choices], Dtype::Int32),
                (vec![rows, choices], Dtype::Float32),
            ],
            _ => vec![(vec![pairs, self.outputs], self.dtype)],
        };
        let groups = (self.outputs + per_group - 1) / per_group;
        kernel.apply(
            inputs,
            &Launch {
                grid: [groups * self.threads, (pairs + most - 1) / most, 1],
                group: [self.threads, 1, 1],
                outputs,
            },
        )
    }

    /// The only result.
    pub(super) fn one(&self, inputs: &[&Array], rows: i32) -> Result<Array> {
        self.apply(inputs, rows)?
            .pop()
            .ok_or_else(|| Exception::custom("a kernel without a result"))
    }
}

/// How the work is cut.
#[derive(Debug, Clone, Copy)]
struct Plan {
    outs: i32,
    chunk: i32,
    repeat: i32,
}

impl Plan {
    fn new(role: Role, rows: i32, inputs: i32, outputs: i32, packing: Packing, language: Language) -> Self {
        let step = 32 * packing.span();
        // A router's group computes all outputs of its row.
        if matches!(role, Role::Router { .. }) {
            return Self {
                outs: (outputs + ROUTER_WARPS - 1) / ROUTER_WARPS,
                chunk: step,
                repeat: 1,
            };
        }
        let outs = match role {
            Role::Gated { .. } | Role::Routed { .. } => 2,
            _ if rows >= 4 => 2,
            _ => 1,
        };
        // Floats that wait in group memory, and weights that wait in registers.
        let memory = match language {
            Language::Cuda => 8192,
            Language::Metal => 4096,
        } / rows;
        let most = match role {
            Role::Mixed { .. } => 6144,
            _ if packing.bits == 0 => memory.min(2048),
            _ => memory.min(6144),
        };
        let whole = (inputs + 1023) / 1024 * 1024;
        let chunk = whole.min(most);
        let repeat = match role {
            _ if chunk < inputs => 1,
            Role::Routed { .. } => 4,
            Role::Mixed { .. } => 2,
            _ => 1,
        };
        Self { outs, chunk, repeat }
    }

    fn outs_of_warp(self, gated: bool) -> i32 {
        self.repeat * if gated { 1 } else { self.outs }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "all of them are what the kernel is made for"
    )]
    fn define(
        self,
        defines: &mut Defines,
        role: Role,
        packing: Packing,
        parts: &[i32],
        inputs: i32,
        outputs: i32,
        width: i32,
    ) {
        let part = |index: usize| parts.get(index).copied().unwrap_or(0);
        let (eps, choices, normalise) = match role {
            Role::Normalised { eps } | Role::Gated { eps } => (Some(eps), 1, true),
            Role::Added => (None, 1, true),
            Role::Router {
                eps,
                choices,
                normalise,
            } => (Some(eps), choices, normalise),
            Role::Routed { eps, choices } => (Some(eps), choices, true),
            Role::Mixed { choices } => (None, choices, true),
        };
        defines
            .set("INPUTS", inputs)
            .set("OUTPUTS", outputs)
            .set("OUTPUTS_0", part(0))
            .set("OUTPUTS_1", part(1))
            .set("PARTS", parts.len())
            .set("OUTS", self.outs)
            .set("CHUNK", self.chunk)
            .set("REPEAT", self.repeat)
            .set("BITS", packing.bits)
            .set("GROUP", packing.group)
            .set("SPAN", packing.span())
            .set("WIDTH", width)
            .set("CHOICES", choices)
            .float("EPSILON", f64::from(eps.unwrap_or_default()))
            .flag("NORM", eps.is_some())
            .flag("NORMALISE", normalise)
            .flag("SWIGLU", matches!(role, Role::Gated { .. } | Role::Routed { .. }))
            .flag("ROUTER", matches!(role, Role::Router { .. }))
            .flag("ROUTED", matches!(role, Role::Routed { .. }))
            .flag("MIXED", matches!(role, Role::Mixed { .. }))
            .flag("RESIDUAL", matches!(role, Role::Added | Role::Mixed { .. }))
            .set("result_t", "elem");
        for index in 0..3 {
            // A part that is not there is never asked for, but its name has to exist.
            let named = if index < parts.len() { index } else { 0 };
            let load = match packing.bits {
                0 => format!("weight_{named}"),
                _ => format!("packed_{named}, scales_{named}, biases_{named}"),
            };
            defines.set(&format!("LOAD_{index}"), load);
        }
    }
}

fn input_names(role: Role, parts: &[i32], packing: Packing) -> Vec<String> {
    let mut names = vec!["x"];
    match role {
        Role::Normalised { .. } | Role::Gated { .. } | Role::Router { .. } => names.push("gain"),
        Role::Routed { .. } => names.extend(["gain", "chosen"]),
        Role::Mixed { .. } => names.extend(["chosen", "shares"]),
        Role::Added => {}
    }
    let mut names: Vec<String> = names.into_iter().map(str::to_owned).collect();
    for index in 0..parts.len() {
        let kinds: &[&str] = match packing.bits {
            0 => &["weight"],
            _ => &["packed", "scales", "biases"],
        };
        names.extend(kinds.iter().map(|kind| format!("{kind}_{index}")));
    }
    if matches!(role, Role::Added | Role::Mixed { .. }) {
        names.push("residual".to_owned());
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [(i32, i32); 3] = [(0, 8), (4, 32), (8, 16)];

    /// What `project.kernel` relies on, for every shape that models have.
    #[test]
    fn plans_fit_the_kernel() {
        for (bits, span) in ALL {
            let packing = Packing { bits, group: 64 };
            assert_eq!(packing.span(), span);
            for language in [Language::Cuda, Language::Metal] {
                let rows_of_language: &[i32] = match language {
                    Language::Cuda => &[1, 4, 8],
                    Language::Metal => &[1, 2, 4],
                };
                for &rows in rows_of_language {
                    for inputs in [64, 512, 1024, 2048, 3072, 4096, 6144, 12288] {
                        for role in [
                            Role::Normalised { eps: 1e-6 },
                            Role::Added,
                            Role::Gated { eps: 1e-6 },
                            Role::Router {
                                eps: 1e-6,
                                choices: 8,
                                normalise: true,
                            },
                            Role::Routed {
                                eps: 1e-6,
                                choices: 8,
                            },
                            Role::Mixed { choices: 8 },
                        ] {
                            let rows = match role {
                                Role::Router { .. } | Role::Routed { .. } | Role::Mixed { .. } => 1,
                                _ => rows,
                            };
                            let plan = Plan::new(role, rows, inputs, 128, packing, language);
                            assert_eq!(plan.chunk % (32 * span), 0);
                            assert!(plan.repeat == 1 || plan.chunk >= inputs);
                            let group_memory = rows * plan.chunk * 4;
                            let most = if language == Language::Metal {
                                28 << 10
                            } else {
                                46 << 10
                            };
                            assert!(group_memory <= most, "{group_memory} for {role:?}");
                        }
                    }
                }
            }
        }
    }

    /// The places of `staged` in `project.kernel`: every element has its own, and the lanes of a warp read neighbours.
    #[test]
    fn staged_inputs_have_places_of_their_own() {
        for (_, span) in ALL {
            let chunk = 2048;
            let place = |k: i32| {
                let (step, within) = (k / (32 * span), k % (32 * span));
                (step * 8 * span + within % span / 4 * 32 + within / span) * 4 + k % 4
            };
            let mut seen: Vec<i32> = (0..chunk).map(place).collect();
            for step in 0..chunk / (32 * span) {
                for eight in 0..span / 8 {
                    for lane in 0..32 {
                        // As the kernel reads them: two groups of four, 32 places apart.
                        let at = step * 8 * span + eight * 64 + lane;
                        let k = (step * 32 + lane) * span + eight * 8;
                        assert_eq!((place(k), place(k + 4)), (at * 4, (at + 32) * 4));
                    }
                }
            }
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..chunk));
        }
    }

    /// The unfolding of packed integers in `weights.kernel`.
    #[test]
    fn integers_in_a_mantissa() {
        let value = |bits: u32| f32::from_bits(bits | 0x3f80_0000);
        for q in 0..16_u32 {
            for i in 0..8_u32 {
                let word = q << (4 * i) | !(15 << (4 * i));
                let moved = if i < 5 {
                    word << (19 - 4 * i)
                } else {
                    word >> (4 * i - 19)
                };
                assert_eq!(value(moved & 0x0078_0000), 1.0 + q as f32 / 16.0);
            }
        }
        for q in 0..256_u32 {
            for i in 0..4_u32 {
                let (at, word) = (8 * i, q << (8 * i) | !(255 << (8 * i)));
                let moved = if at < 15 {
                    word << (15 - at)
                } else {
                    word >> (at - 15)
                };
                assert_eq!(value(moved & 0x007f_8000), 1.0 + q as f32 / 256.0);
            }
        }
    }
}
