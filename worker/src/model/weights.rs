//! Weight files: one or many safetensors, memory-mapped, one array per file, tensors as views of it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use mlx_ext::mapped::MappedWords;
use mlx_ext::{MappedFile, MappedTensor};
use mlx_rs::{Array, Dtype};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as FileDtype, Metadata};
use serde_json::Value;

use super::{LoadError, LoadOptions, LoadPhase, LoadProgress};
use crate::volumes::explain;

/// How the weights lie in memory, for logs and status.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Storage {
    /// Bytes of tensors that are views of the arrays over mapped files.
    pub mapped_bytes: u64,
    /// Those arrays are the files' own pages, as on Metal. The CPU and CUDA builds of MLX copy the files.
    pub in_place: bool,
    /// Bytes of tensors that were copied: read on request, or because they lie at odd addresses in their file.
    pub copied_bytes: u64,
    /// Bytes that are held for them: an array over a whole file stays as long as one tensor in it is a view, beside the tensors
    /// that were copied out of the same file.
    pub held_bytes: u64,
}

/// A weight file that is held open.
#[derive(Debug, Clone)]
pub struct WeightFile {
    /// Its name.
    pub path: PathBuf,
    file: MappedFile,
}

impl WeightFile {
    /// Opens it.
    ///
    /// # Errors
    /// The system's, or an empty file.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        Ok(Self {
            path: path.to_path_buf(),
            file: MappedFile::open(path)?,
        })
    }

    /// Reads the first and the last byte of the file anew. Blocks as long as its volume lets it.
    ///
    /// # Errors
    /// The system's: the volume is gone, or the file has been shortened.
    pub fn look(&self) -> std::io::Result<()> {
        self.file.read_ends()
    }
}

/// The first of these files that cannot be read any more, in words. One whose volume does not answer within `limit` is
/// such a file.
pub(crate) fn lost(files: &[WeightFile], limit: Duration) -> Option<String> {
    let (looked, looks) = mpsc::channel();
    let to_look = files.to_vec();
    // On a thread of its own, which may never come back.
    let thread = std::thread::Builder::new().name("look".to_owned());
    if let Err(error) = thread.spawn(move || to_look.iter().all(|file| looked.send(file.look()).is_ok())) {
        tracing::warn!("the weight files are not looked at: {error}");
        return None;
    }
    files.iter().find_map(|file| {
        let reason = match looks.recv_timeout(limit) {
            Ok(Ok(())) => return None,
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer for {} s", limit.as_secs_f64()),
        };
        Some(format!(
            "{}: this file, from which the device reads weights, cannot be read any more ({reason}): it was shortened, or its \
             volume is gone",
            file.path.display()
        ))
    })
}

/// All tensors of a model by name, each handed out at most once.
pub struct Weights<'a> {
    folder: PathBuf,
    shards: Vec<Shard>,
    /// Tensor name to shard.
    places: HashMap<String, usize>,
    taken: HashSet<String>,
    bytes: u64,
    storage: Storage,
    expand: bool,
    on_cuda: bool,
    progress: &'a mut dyn FnMut(LoadProgress),
    /// Bytes of tensors handed out, as they lie in the files; and how many of them have been reported.
    done: u64,
    reported: u64,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: MappedFile,
    /// `None` when the weights are to be read instead of mapped.
    words: Option<MappedWords>,
    metadata: Metadata,
    /// First byte of the data, after the header.
    data_start: usize,
    /// A tensor has been handed out that is a view of `words`.
    viewed: bool,
}

const INDEX: &str = "model.safetensors.index.json";

/// Progress is reported each time one in so many bytes more is there.
const REPORTS: u64 = 100;

impl<'a> Weights<'a> {
    /// Opens every weight file of `folder` and reads the headers. `progress` is called now and while tensors are taken:
    /// where files are not used in place, that is when they are read.
    ///
    /// # Errors
    ///
    /// No weight file, one that is missing from the index's list, truncated or corrupt.
    pub fn open(
        folder: &Path,
        options: LoadOptions,
        progress: &'a mut dyn FnMut(LoadProgress),
    ) -> Result<Self, LoadError> {
        let on_cuda = mlx_ext::Language::of_device()? == Some(mlx_ext::Language::Cuda);
        let files = list(folder)?;
        let total = bytes(folder)?;
        let mut weights = Self {
            folder: folder.to_path_buf(),
            shards: Vec::with_capacity(files.len()),
            places: HashMap::new(),
            taken: HashSet::new(),
            bytes: total,
            storage: Storage::default(),
            expand: options.expand,
            on_cuda,
            progress,
            done: 0,
            reported: 0,
        };
        weights.report(0);
        for path in files {
            // Elsewhere than on Metal an array over a file is a copy of all of it; CUDA's tensors get memory of their own, and
            // so do those that are expanded.
            let shard = Shard::open(path, options.mapped && !on_cuda && !options.expand)?;
            for name in shard.metadata.tensors().into_keys() {
                weights.places.insert(name, weights.shards.len());
            }
            weights.shards.push(shard);
            weights.storage.in_place = weights.shards.iter().all(Shard::in_place);
            // An array over a file may have taken its time, but none of its tensors is there yet.
            weights.report(0);
        }
        Ok(weights)
    }

    /// So many bytes of all files are done with.
    fn report(&mut self, done: u64) {
        self.reported = done;
        (self.progress)(LoadProgress {
            phase: LoadPhase::Weights,
            done,
            total: self.bytes,
        });
    }

    /// The last report: headers, and tensors that nobody wants, count as done.
    pub(crate) fn report_all(&mut self) {
        self.report(self.bytes);
    }

    /// The files that have to stay readable as long as the weights are used.
    pub(crate) fn device_reads(&self) -> Vec<WeightFile> {
        self.shards
            .iter()
            .filter(|shard| shard.in_place())
            .map(|shard| WeightFile {
                path: shard.path.clone(),
                file: shard.file.clone(),
            })
            .collect()
    }

    /// Bytes of all files.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How the tensors taken so far lie in memory.
    #[must_use]
    pub fn storage(&self) -> Storage {
        let viewed = self.shards.iter().filter(|shard| shard.viewed);
        let files: u64 = viewed.map(|shard| shard.file.bytes().len() as u64).sum();
        Storage {
            held_bytes: files.saturating_add(self.storage.copied_bytes),
            ..self.storage
        }
    }

    /// Whether there is a tensor of that name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// Quantised tensors are to be expanded.
    pub(crate) fn expands(&self) -> bool {
        self.expand
    }

    /// The float tensor `name` (float32, float16 or bfloat16) of exactly that shape.
    pub(crate) fn float(&mut self, name: &str, shape: &[i32]) -> Result<Array, LoadError> {
        let found = self.take(name, shape, &[FileDtype::F32, FileDtype::F16, FileDtype::BF16])?;
        if !self.expand || found.dtype() == Dtype::Float32 {
            return Ok(found);
        }
        let single = found.as_type::<f32>()?;
        single.eval()?;
        Ok(single)
    }

    /// The tensor `name` of packed integers of exactly that shape.
    pub(crate) fn packed(&mut self, name: &str, shape: &[i32]) -> Result<Array, LoadError> {
        self.take(name, shape, &[FileDtype::U32])
    }

    fn take(&mut self, name: &str, shape: &[i32], types: &[FileDtype]) -> Result<Array, LoadError> {
        let shard = self.places.get(name).copied();
        let Some(shard) = shard.and_then(|shard| self.shards.get_mut(shard)) else {
            return Err(self.missing(name));
        };
        let (array, copied) = shard.tensor(name, shape, types)?;
        shard.viewed |= !copied;
        let stored = array.nbytes() as u64;
        let array = if self.on_cuda { to_device(&array)? } else { array };
        let bytes = array.nbytes() as u64;
        let kind = if copied {
            &mut self.storage.copied_bytes
        } else {
            &mut self.storage.mapped_bytes
        };
        *kind += bytes;
        self.taken.insert(name.to_owned());
        self.done = self.done.saturating_add(stored).min(self.bytes);
        if self.done - self.reported > self.bytes / REPORTS {
            self.report(self.done);
        }
        Ok(array)
    }

    /// The error for a tensor that no file has.
    pub(crate) fn missing(&self, name: &str) -> LoadError {
        let file = match self.shards.as_slice() {
            [only] => only.path.clone(),
            _ => self.folder.clone(),
        };
        LoadError::Tensor {
            file,
            tensor: name.to_owned(),
            reason: "missing".to_owned(),
        }
    }

    /// Tensors that no layer asked for are legal (older files carry rotary tables, say) but worth a word.
    pub(crate) fn log(&self) {
        let Storage {
            mapped_bytes,
            in_place,
            copied_bytes,
            ..
        } = self.storage;
        tracing::info!(mapped_bytes, in_place, copied_bytes, "weights");
        if copied_bytes > 0 && self.shards.iter().any(|shard| shard.words.is_some()) {
            tracing::warn!(
                copied_bytes,
                "tensors that do not lie on a multiple of their element's size in the file were copied into memory"
            );
        }
        let mut unused: Vec<&str> = self
            .places
            .keys()
            .filter(|name| !self.taken.contains(*name))
            .map(String::as_str)
            .collect();
        unused.sort_unstable();
        if let Some(first) = unused.first() {
            tracing::warn!(
                count = unused.len(),
                first,
                "tensors in the weight files that the model does not use"
            );
        }
    }
}

/// Bytes of all weight files of a model, before any of them is opened.
///
/// # Errors
///
/// No weight file, or one that is missing from the index's list.
pub(crate) fn bytes(folder: &Path) -> Result<u64, LoadError> {
    let size = |path: &PathBuf| {
        fs::metadata(path)
            .map(|data| data.len())
            .map_err(|error| failed(path, explain(path, &error)))
    };
    list(folder)?.iter().map(size).sum()
}

/// The weight files of a model, before any of them is opened.
///
/// # Errors
///
/// No weight file, or an index that cannot be read.
pub(crate) fn files(folder: &Path) -> Result<Vec<PathBuf>, LoadError> {
    list(folder)
}

/// Whether a model's activations take two bytes an element: those of its embedding do.
///
/// # Errors
///
/// No weight file, or one that cannot be read.
pub(crate) fn has_half_floats(folder: &Path) -> Result<bool, LoadError> {
    let mut half = false;
    for path in list(folder)? {
        let shard = Shard::open(path, false)?;
        let tensors = shard.metadata.tensors();
        let dtype = |name: &str| tensors.get(name).map(|tensor| tensor.dtype);
        if let Some(dtype) = dtype("model.embed_tokens.scales").or_else(|| dtype("model.embed_tokens.weight"))
        {
            half = dtype != FileDtype::F32;
            if dtype != FileDtype::U32 {
                break;
            }
        }
    }
    Ok(half)
}

/// The files that the index names, else every `model*.safetensors`.
fn list(folder: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let index = folder.join(INDEX);
    if index.is_file() {
        let text = fs::read_to_string(&index).map_err(|error| failed(&index, error))?;
        let value: Value =
            serde_json::from_str(&text).map_err(|error| failed(&index, format!("not JSON: {error}")))?;
        let map = value.get("weight_map").and_then(Value::as_object);
        let map = map.ok_or_else(|| failed(&index, "weight_map: missing or not an object"))?;
        let mut files = BTreeSet::new();
        for (tensor, file) in map {
            // A file name only: an index must not reach outside its folder.
            let name = file
                .as_str()
                .filter(|name| Path::new(name).file_name() == Some(name.as_ref()));
            let name = name
                .ok_or_else(|| failed(&index, format!("weight_map.{tensor}: {file} is not a file name")))?;
            files.insert(folder.join(name));
        }
        return Ok(files.into_iter().collect());
    }
    let entries = fs::read_dir(folder).map_err(|error| failed(folder, explain(folder, &error)))?;
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            name.starts_with("model") && name.ends_with(".safetensors")
        })
        .collect();
    files.sort();
    if files.is_empty() {
        return Err(failed(folder, "no model*.safetensors in this folder"));
    }
    Ok(files)
}

fn failed(file: &Path, reason: impl ToString) -> LoadError {
    LoadError::File {
        file: file.to_path_buf(),
        reason: reason.to_string(),
    }
}

/// The first tensor that ends behind the end of a safetensors file, and where it ends; `None` when the header itself
/// cannot be read. <https://huggingface.co/docs/safetensors> has the format.
fn first_cut_off(bytes: &[u8]) -> Option<(String, usize)> {
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(rest.get(..length)?).ok()?;
    let end = |tensor: &Value| {
        let end = tensor.pointer("/data_offsets/1")?.as_u64()?;
        usize::try_from(end).ok()?.checked_add(size_of::<u64>() + length)
    };
    header
        .into_iter()
        .filter_map(|(name, tensor)| Some((name, end(&tensor)?)))
        .filter(|(_, end)| *end > bytes.len())
        .min_by_key(|(_, end)| *end)
}

impl Shard {
    fn open(path: PathBuf, mapped: bool) -> Result<Self, LoadError> {
        let file = MappedFile::open(&path).map_err(|error| failed(&path, error))?;
        let bytes = file.bytes();
        // Checks the header and that the file ends where the last tensor does.
        let (header, metadata) =
            SafeTensors::read_metadata(bytes).map_err(|error| match first_cut_off(bytes) {
                Some((tensor, end)) => LoadError::Tensor {
                    file: path.clone(),
                    tensor,
                    reason: format!(
                        "truncated or corrupt file: it should end at byte {end}, the file has {} bytes",
                        bytes.len()
                    ),
                },
                None => failed(
                    &path,
                    format!(
                        "{} bytes, truncated or corrupt safetensors file: {error:?}",
                        bytes.len()
                    ),
                ),
            })?;
        // Eight bytes with the header's length, then the header.
        let data_start = header + size_of::<u64>();
        let words = if mapped {
            Some(file.words().map_err(|error| failed(&path, error.what()))?)
        } else {
            None
        };
        Ok(Self {
            path,
            file,
            words,
            metadata,
            data_start,
            viewed: false,
        })
    }

    fn in_place(&self) -> bool {
        self.words.as_ref().is_some_and(MappedWords::in_place)
    }

    /// The tensor, and whether it had to be copied.
    fn tensor(&self, name: &str, shape: &[i32], types: &[FileDtype]) -> Result<(Array, bool), LoadError> {
        let error = |reason| LoadError::Tensor {
            file: self.path.clone(),
            tensor: name.to_owned(),
            reason,
        };
        let info = self
            .metadata
            .info(name)
            .ok_or_else(|| error("missing".to_owned()))?;
        if !types.contains(&info.dtype) {
            return Err(error(format!("type {:?}, expected one of {types:?}", info.dtype)));
        }
        let same = info.shape.len() == shape.len()
            && info
                .shape
                .iter()
                .zip(shape)
                .all(|(&found, &expected)| i32::try_from(found) == Ok(expected));
        if !same {
            return Err(error(format!("shape {:?}, expected {shape:?}", info.shape)));
        }
        let (dtype, element) = match info.dtype {
            FileDtype::F32 => (Dtype::Float32, 4),
            FileDtype::F16 => (Dtype::Float16, 2),
            FileDtype::BF16 => (Dtype::Bfloat16, 2),
            FileDtype::U32 => (Dtype::Uint32, 4),
            other => return Err(error(format!("type {other:?} is not supported"))),
        };
        let (start, end) = info.data_offsets;
        let (start, end) = (self.data_start + start, self.data_start + end);
        if let Some(words) = &self.words {
            let place = MappedTensor {
                offset: start,
                dtype,
                element,
                shape,
            };
            if let Some(array) = words
                .tensor(&place)
                .map_err(|failure| error(failure.what().to_owned()))?
            {
                return Ok((array, false));
            }
        }
        let bytes = self
            .file
            .bytes()
            .get(start..end)
            .ok_or_else(|| error("outside its file".to_owned()))?;
        let array = copy(bytes, dtype, element, shape).map_err(|failure| error(failure.what().to_owned()))?;
        Ok((array, true))
    }
}

/// The same bits in the device's own memory, at an address that suits 16-byte loads. CUDA's arrays over host data lie in
/// memory that moves between host and device, at any address within a file.
fn to_device(array: &Array) -> mlx_rs::error::Result<Array> {
    let plain = match array.dtype() {
        Dtype::Float16 | Dtype::Bfloat16 => Dtype::Uint16,
        _ => Dtype::Uint32,
    };
    let bits = mlx_ext::ops::view(array, plain)?;
    bits.eval()?;
    // An operation's result is allocated on the device; `bits` is kept, so that it is not the one reused.
    let moved = mlx_ext::ops::bitwise_or(&bits, &mlx_rs::ops::zeros_dtype(&[1], plain)?)?;
    moved.eval()?;
    drop(bits);
    let found = mlx_ext::ops::view(&moved, array.dtype())?;
    found.eval()?;
    Ok(found)
}

/// An array of its own from a file's bytes, which may lie at any address.
fn copy(bytes: &[u8], dtype: Dtype, element: usize, shape: &[i32]) -> mlx_rs::error::Result<Array> {
    // As bytes the last axis is longer by the size of an element; `view` folds it again.
    let mut byte_shape = shape.to_vec();
    match byte_shape.last_mut() {
        Some(last) => *last *= i32::try_from(element).unwrap_or(1),
        None => byte_shape.push(i32::try_from(element).unwrap_or(1)),
    }
    let raw = Array::from_slice(bytes, &byte_shape);
    mlx_ext::ops::view(&raw, dtype)?.reshape(shape)
}
