//! A decoder of kernels: the next token's scores for each of several sequences, from one graph that MLX keeps.

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;

use mlx_ext::Compiled;
use mlx_rs::error::{Exception, Result};
use mlx_rs::{Array, Dtype};

use super::attend::{Attend, Places};
use super::project::{Project, Role, arrays};
use super::{Made, unfit};
use crate::model::config::ModelConfig;
use crate::model::layers::Matrix;

/// A decoder's weights.
#[derive(Debug)]
pub(in crate::model) struct Weights {
    pub(in crate::model) embedding: Matrix,
    pub(in crate::model) layers: Vec<LayerWeights>,
    pub(in crate::model) gain: Array,
    /// The embedding where that serves.
    pub(in crate::model) head: Matrix,
}

/// A layer's weights.
#[derive(Debug)]
pub(in crate::model) struct LayerWeights {
    pub(in crate::model) attention_gain: Array,
    pub(in crate::model) attention: AttentionWeights,
    pub(in crate::model) feed_gain: Array,
    pub(in crate::model) feed: Feed,
}

/// An attention's weights.
#[derive(Debug)]
pub(in crate::model) struct AttentionWeights {
    pub(in crate::model) query: Matrix,
    pub(in crate::model) key: Matrix,
    pub(in crate::model) value: Matrix,
    pub(in crate::model) query_gain: Array,
    pub(in crate::model) key_gain: Array,
    pub(in crate::model) output: Matrix,
}

/// A feed-forward network's weights.
#[derive(Debug)]
pub(in crate::model) enum Feed {
    Dense {
        gate: Matrix,
        up: Matrix,
        down: Matrix,
    },
    Experts {
        router: Matrix,
        gate: Matrix,
        up: Matrix,
        down: Matrix,
        choices: i32,
        normalise: bool,
    },
}

/// Graphs that are kept. MLX gives each of their nodes a copy of its kernel's text, and steps of all shapes would keep them all.
const MOST_GRAPHS: usize = 32;

/// The decoder.
pub(in crate::model) struct KernelDecoder {
    network: Rc<Network>,
    /// One for each number of rows and width of their tables.
    graphs: RefCell<Kept<[i32; 2], Compiled>>,
}

impl fmt::Debug for KernelDecoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelDecoder").finish_non_exhaustive()
    }
}

impl KernelDecoder {
    /// For these weights and the keys and values of every layer in these slabs; `block`: positions of a block of the cache.
    pub(in crate::model) fn new(
        config: &ModelConfig,
        weights: Weights,
        slabs: &[[&Array; 2]],
        block: i32,
    ) -> Made<Self> {
        Ok(Self {
            network: Rc::new(Network::new(config, weights, slabs, block)?),
            graphs: RefCell::new(Kept::new(MOST_GRAPHS)),
        })
    }

    /// `tokens`: `[1, rows]`; `positions`: `[rows]`, int32; `tables`: `[rows, width]`, int32. Returns `[rows, vocabulary]`.
    pub(in crate::model) fn scores(
        &self,
        tokens: &Array,
        positions: &Array,
        tables: &Array,
    ) -> Result<Array> {
        let mut graphs = self.graphs.borrow_mut();
        let graph = graphs.get([tables.dim(0), tables.dim(1)], || {
            let network = Rc::clone(&self.network);
            Compiled::new(move |inputs: &[Array]| match inputs {
                [tokens, positions, tables] => Ok(vec![network.scores(tokens, positions, tables)?]),
                _ => Err(Exception::custom("a step has tokens, positions and tables")),
            })
        })?;
        graph
            .apply(&[tokens, positions, tables])?
            .pop()
            .ok_or_else(|| Exception::custom("a step without scores"))
    }
}

/// The values that were asked for last, a few of them.
struct Kept<K, V> {
    most: usize,
    /// The last one first.
    values: Vec<(K, V)>,
}

impl<K: PartialEq, V> Kept<K, V> {
    fn new(most: usize) -> Self {
        Self {
            most,
            values: Vec::with_capacity(most),
        }
    }

    fn get(&mut self, key: K, make: impl FnOnce() -> Result<V>) -> Result<&V> {
        match self.values.iter().position(|(known, _)| *known == key) {
            Some(place) => {
                if let Some(passed) = self.values.get_mut(..=place) {
                    passed.rotate_right(1);
                }
            }
            None => {
                self.values.truncate(self.most.saturating_sub(1));
                self.values.insert(0, (key, make()?));
            }
        }
        let first = self.values.first().map(|(_, value)| value);
        first.ok_or_else(|| Exception::custom("nothing was made"))
    }
}

/// What the graph is built from.
struct Network {
    weights: Weights,
    slabs: Vec<[Array; 2]>,
    attend: Attend,
    joined: Vec<Project>,
    output: Vec<Project>,
    feeds: Vec<FeedKernels>,
    /// Of each layer: its place in `joined`, `output` and `feeds`.
    kinds: Vec<[usize; 3]>,
    head: Project,
    dtype: Dtype,
}

#[derive(Debug)]
enum FeedKernels {
    Dense {
        open: Project,
        close: Project,
    },
    Experts {
        router: Project,
        open: Project,
        close: Project,
    },
}

impl Network {
    fn new(config: &ModelConfig, weights: Weights, slabs: &[[&Array; 2]], block: i32) -> Made<Self> {
        let dtype = weights.embedding.dtype();
        let eps = config.norm_eps;
        let (mut joined, mut output, mut feeds) = (Shared::default(), Shared::default(), Shared::default());
        let mut kinds = Vec::with_capacity(weights.layers.len());
        for layer in &weights.layers {
            let attention = &layer.attention;
            let parts = [&attention.query, &attention.key, &attention.value];
            kinds.push([
                joined.place(signature(&parts), |index| {
                    Project::new(&format!("joined{index}"), Role::Normalised { eps }, &parts, dtype)
                })?,
                output.place(signature(&[&attention.output]), |index| {
                    Project::new(
                        &format!("output{index}"),
                        Role::Added,
                        &[&attention.output],
                        dtype,
                    )
                })?,
                feeds.place(layer.feed.signature(), |index| {
                    layer.feed.kernels(index, eps, dtype)
                })?,
            ]);
        }
        let head = Project::new("head", Role::Normalised { eps }, &[&weights.head], dtype)?;
        let positions = match slabs.first() {
            Some([keys, _]) if slabs.len() == weights.layers.len() => keys.dim(1),
            _ => return Err(unfit("a cache of another number of layers")),
        };
        Ok(Self {
            attend: Attend::new(config, positions, block, dtype)?,
            slabs: slabs.iter().map(|layer| layer.map(Array::clone)).collect(),
            weights,
            joined: joined.values,
            output: output.values,
            feeds: feeds.values,
            kinds,
            head,
            dtype,
        })
    }

    fn scores(&self, tokens: &Array, positions: &Array, tables: &Array) -> Result<Array> {
        let rows = positions.dim(0);
        let mut x = self.weights.embedding.rows(tokens)?.reshape(&[rows, -1])?;
        if x.dtype() != self.dtype {
            return Err(Exception::custom("an embedding of another type than the weights"));
        }
        for ((layer, [keys, values]), kinds) in self.weights.layers.iter().zip(&self.slabs).zip(&self.kinds) {
            let [joined, output, feed] = *kinds;
            let (Some(joined), Some(output), Some(feed)) = (
                self.joined.get(joined),
                self.output.get(output),
                self.feeds.get(feed),
            ) else {
                return Err(Exception::custom("a layer without kernels"));
            };
            let mut inputs = vec![&x, &layer.attention_gain];
            let attention = &layer.attention;
            for matrix in [&attention.query, &attention.key, &attention.value] {
                inputs.extend(arrays(matrix));
            }
            let projected = joined.one(&inputs, rows)?;
            let places = Places {
                positions,
                tables,
                keys,
                values,
            };
            let mixed =
                self.attend
                    .apply(&projected, [&attention.query_gain, &attention.key_gain], places)?;
            x = output.one(&with_residual(&mixed, &[], &attention.output, &x), rows)?;
            x = feed.apply(layer, &x, rows)?;
        }
        let mut inputs = vec![&x, &self.weights.gain];
        inputs.extend(arrays(&self.weights.head));
        self.head.one(&inputs, rows)
    }
}

/// Inputs of a product that adds to a residual.
fn with_residual<'a>(
    x: &'a Array,
    others: &[&'a Array],
    matrix: &'a Matrix,
    residual: &'a Array,
) -> Vec<&'a Array> {
    let mut inputs = vec![x];
    inputs.extend(others);
    inputs.extend(arrays(matrix));
    inputs.push(residual);
    inputs
}

impl FeedKernels {
    fn apply(&self, layer: &LayerWeights, x: &Array, rows: i32) -> Result<Array> {
        let opened = |gate, up, chosen: Option<&Array>, open: &Project| {
            let mut inputs = vec![x, &layer.feed_gain];
            inputs.extend(chosen);
            inputs.extend(arrays(gate));
            inputs.extend(arrays(up));
            open.one(&inputs, rows)
        };
        match (self, &layer.feed) {
            (Self::Dense { open, close }, Feed::Dense { gate, up, down }) => {
                let inside = opened(gate, up, None, open)?;
                close.one(&with_residual(&inside, &[], down, x), rows)
            }
            (
                Self::Experts {
                    router: route,
                    open,
                    close,
                },
                Feed::Experts {
                    router,
                    gate,
                    up,
                    down,
                    ..
                },
            ) => {
                let mut inputs = vec![x, &layer.feed_gain];
                inputs.extend(arrays(router));
                let routed = route.apply(&inputs, rows)?;
                let [chosen, shares] = routed.as_slice() else {
                    return Err(Exception::custom("a router without a choice"));
                };
                let inside = opened(gate, up, Some(chosen), open)?.reshape(&[rows, -1])?;
                close.one(&with_residual(&inside, &[chosen, shares], down, x), rows)
            }
            _ => Err(Exception::custom("a layer with another layer's kernels")),
        }
    }
}

impl Feed {
    fn signature(&self) -> String {
        match self {
            Self::Dense { gate, up, down } => signature(&[gate, up, down]),
            Self::Experts {
                router,
                gate,
                up,
                down,
                ..
            } => signature(&[router, gate, up, down]),
        }
    }

    fn kernels(&self, index: usize, eps: f32, dtype: Dtype) -> Made<FeedKernels> {
        let new = |name: &str, role, matrices: &[&Matrix]| {
            Project::new(&format!("{name}{index}"), role, matrices, dtype)
        };
        match self {
            Self::Dense { gate, up, down } => Ok(FeedKernels::Dense {
                open: new("open", Role::Gated { eps }, &[gate, up])?,
                close: new("close", Role::Added, &[down])?,
            }),
            &Self::Experts {
                ref router,
                ref gate,
                ref up,
                ref down,
                choices,
                normalise,
            } => Ok(FeedKernels::Experts {
                router: new(
                    "router",
                    Role::Router {
                        eps,
                        choices,
                        normalise,
                    },
                    &[router],
                )?,
                open: new("open", Role::Routed { eps, choices }, &[gate, up])?,
                close: new("close", Role::Mixed { choices }, &[down])?,
            }),
        }
    }
}

/// Values by signature: most layers are alike and share their kernels.
struct Shared<T> {
    signatures: Vec<String>,
    values: Vec<T>,
}

impl<T> Default for Shared<T> {
    fn default() -> Self {
        Self {
            signatures: Vec::new(),
            values: Vec::new(),
        }
    }
}

impl<T> Shared<T> {
    fn place(&mut self, signature: String, make: impl FnOnce(usize) -> Made<T>) -> Made<usize> {
        if let Some(known) = self.signatures.iter().position(|known| *known == signature) {
            return Ok(known);
        }
        let index = self.values.len();
        self.values.push(make(index)?);
        self.signatures.push(signature);
        Ok(index)
    }
}

/// What two layers must have in common to share kernels.
fn signature(matrices: &[&Matrix]) -> String {
    let one = |matrix: &&Matrix| match matrix {
        Matrix::Plain(weight) => format!("{:?} {:?}", weight.dtype(), weight.shape()),
        Matrix::Quantised {
            packed,
            scales,
            affine,
            ..
        } => format!("{:?} {:?} {affine:?}", scales.dtype(), packed.shape()),
    };
    matrices.iter().map(one).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_of_one_kind_share_their_kernels() {
        let mut kept = Shared::default();
        let mut made = Vec::new();
        for signature in ["a", "b", "a", "c", "b"] {
            let place = kept.place(signature.to_owned(), |index| {
                made.push(signature);
                Ok(index)
            });
            let expected = ["a", "b", "c"].iter().position(|&name| name == signature);
            assert_eq!(place.ok(), expected);
        }
        assert_eq!(made, ["a", "b", "c"]);
        assert!(kept.place("d".to_owned(), |_| Err(unfit("no"))).is_err());
        assert_eq!(kept.values, [0, 1, 2]);
    }

    #[test]
    fn the_graphs_asked_for_last_are_kept() {
        let mut kept = Kept::new(2);
        let mut made = Vec::new();
        for key in [1, 2, 1, 3, 1, 2, 2, 3] {
            let value = kept.get(key, || {
                made.push(key);
                Ok(10 * key)
            });
            assert_eq!(*value.unwrap(), 10 * key);
        }
        // 3 takes the place of 2, which takes that of 3, which takes that of 1.
        assert_eq!(made, [1, 2, 3, 2, 3]);
        assert!(kept.get(4, || Err(Exception::custom("no"))).is_err());
    }
}
