//! Arrays over memory-mapped files.
//!
//! A whole file becomes one array, and every tensor in it a slice of that array viewed as the tensor's type. On Metal
//! the file's pages themselves are the buffer (MLX wraps them without a copy, because a mapping starts on a page and
//! covers whole pages): weights stay clean, file-backed memory that the system can drop and read again, nothing is read
//! up front, and the GPU driver counts one resource a file instead of thousands. **On the CPU and CUDA builds MLX copies
//! the file when the array is made.**

use crate::error;
use crate::lost::Known;
use crate::ops::{slice, view};
use memmap2::Mmap;
use mlx_rs::error::{Exception, Result};
use mlx_rs::{Array, Dtype};
use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// Elements of the array over a file: 8 bytes each, so that a file of 16 GiB still has a length that fits an `i32`.
const WORD: usize = size_of::<u64>();

/// A file mapped read-only.
#[derive(Debug, Clone)]
pub struct MappedFile {
    mapping: Arc<Mapping>,
}

#[derive(Debug)]
struct Mapping {
    // Dropped before the mapping.
    _known: Known,
    map: Mmap,
    file: File,
}

impl MappedFile {
    /// Maps the whole file.
    ///
    /// The file must not be shortened while it is mapped, and its volume must stay: reading a page that is gone ends the
    /// process, with a message (see `lost`).
    ///
    /// # Errors
    ///
    /// The file cannot be opened or mapped, or is empty.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        if length == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is empty"));
        }
        // A disk that fails is an error here, and a signal later.
        read_ends(&file, length)?;
        // SAFETY: the mapping is private and read-only. Another process that writes to a model file while it is in use
        // changes the numbers that inference reads; it cannot break memory safety here, because the bytes are only
        // ever read as plain numbers, apart from the header, which is parsed from a checked copy of them.
        let map = unsafe { Mmap::map(&file)? };
        let known = Known::new(&map, path);
        Ok(Self {
            mapping: Arc::new(Mapping {
                _known: known,
                map,
                file,
            }),
        })
    }

    /// Reads the first and the last byte, not through the mapping: a page that is gone is an error and no signal then.
    /// Blocks as long as the file's volume lets it.
    ///
    /// # Errors
    ///
    /// The system's: the volume is gone, or the file is shorter than it was.
    pub fn read_ends(&self) -> io::Result<()> {
        read_ends(&self.mapping.file, self.mapping.map.len() as u64)
    }

    /// The file's bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.mapping.map
    }

    /// Asks the system to read a range of bytes into memory soon.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn will_need(&self, range: std::ops::Range<usize>) -> io::Result<()> {
        self.mapping
            .map
            .advise_range(memmap2::Advice::WillNeed, range.start, range.len())
    }

    /// The array over the whole file, as 8-byte words. It covers whole pages (Metal takes no other memory without a
    /// copy), so that its end lies beyond the file's, in the zeros that fill the last page.
    ///
    /// # Errors
    ///
    /// A file of more than 16 GiB.
    pub fn words(&self) -> Result<MappedWords> {
        let length = self.mapping.map.len();
        let words = i32::try_from(length.next_multiple_of(page_size()) / WORD).map_err(|_| {
            Exception::custom(format!(
                "a file of {length} bytes is too large for one array (at most 16 GiB)"
            ))
        })?;
        let payload = Arc::into_raw(Arc::clone(&self.mapping));
        let array = error::array(|result| {
            // SAFETY: the data are readable for `words` words, since a mapping covers whole pages. MLX never writes to them: it only donates buffers it has allocated itself, and this
            // one is always shared with the tensors cut from it. The payload keeps the mapping alive until MLX calls
            // `release`, which happens once.
            unsafe {
                *result = mlx_sys::mlx_array_new_data_managed_payload(
                    self.mapping.map.as_ptr().cast_mut().cast::<c_void>(),
                    &words,
                    1,
                    Dtype::Uint64.into(),
                    payload.cast_mut().cast::<c_void>(),
                    Some(release),
                );
                i32::from((*result).ctx.is_null())
            }
        })?;
        // SAFETY: the array was just made from data, so that it is evaluated and has some.
        let data = unsafe { mlx_sys::mlx_array_data_uint64(array.as_ptr()) };
        let in_place = data.cast::<u8>() == self.mapping.map.as_ptr();
        Ok(MappedWords {
            array,
            length,
            in_place,
        })
    }
}

/// The first and the last of `length` bytes, which are not 0.
fn read_ends(file: &File, length: u64) -> io::Result<()> {
    for offset in [0, length - 1] {
        file.read_exact_at(&mut [0], offset)?;
    }
    Ok(())
}

/// Bytes of a page of memory.
pub(crate) fn page_size() -> usize {
    use nix::unistd::{SysconfVar, sysconf};
    let asked = sysconf(SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|bytes| usize::try_from(bytes).ok());
    // Every system answers; 4096 divides every page size there is, so that it is never too much.
    asked.filter(|&bytes| bytes >= WORD).unwrap_or(4096)
}

/// Called by MLX when the last array over a mapping is gone.
extern "C" fn release(payload: *mut c_void) {
    // SAFETY: `payload` came from Arc::into_raw in `words` and is given back once.
    drop(unsafe { Arc::from_raw(payload.cast_const().cast::<Mapping>()) });
}

/// The array over a file, from which tensors are cut.
#[derive(Debug)]
pub struct MappedWords {
    array: Array,
    /// Bytes in the file.
    length: usize,
    in_place: bool,
}

/// A tensor's place in a file.
#[derive(Debug, Clone, Copy)]
pub struct MappedTensor<'a> {
    /// First byte, counted from the file's start.
    pub offset: usize,
    /// Type of an element.
    pub dtype: Dtype,
    /// Bytes of an element.
    pub element: usize,
    /// Elements along each axis.
    pub shape: &'a [i32],
}

impl MappedWords {
    /// Whether the array is the file's own pages, and not a copy of them.
    #[must_use]
    pub fn in_place(&self) -> bool {
        self.in_place
    }

    /// The tensor as a view of the file's array, or `None` when its first byte does not lie on a multiple of its
    /// element's size: the hardware cannot read it in place, and the caller has to copy it.
    ///
    /// # Errors
    ///
    /// A tensor that does not lie within the file.
    pub fn tensor(&self, tensor: &MappedTensor<'_>) -> Result<Option<Array>> {
        let MappedTensor {
            offset,
            dtype,
            element,
            shape,
        } = *tensor;
        if element == 0 || !WORD.is_multiple_of(element) {
            return Err(Exception::custom(format!("elements of {element} bytes")));
        }
        if !offset.is_multiple_of(element) {
            return Ok(None);
        }
        let count = shape
            .iter()
            .try_fold(1_usize, |product, &n| {
                product.checked_mul(usize::try_from(n).ok()?)
            })
            .ok_or_else(|| Exception::custom(format!("shape {shape:?} is not one of a tensor")))?;
        let end = count
            .checked_mul(element)
            .and_then(|bytes| bytes.checked_add(offset));
        let Some(end) = end.filter(|&end| end <= self.length) else {
            return Err(Exception::custom(format!(
                "a tensor of shape {shape:?} does not fit into its file"
            )));
        };
        let index =
            |n: usize| i32::try_from(n).map_err(|_| Exception::custom("a tensor of too many elements"));
        let first_word = offset / WORD;
        let words = slice(&self.array, &[index(first_word)?], &[index(end.div_ceil(WORD))?])?;
        let elements = view(&words, dtype)?;
        // The cut at whole words may have brought a few elements too many on either side.
        let skip = (offset - first_word * WORD) / element;
        let exact = slice(&elements, &[index(skip)?], &[index(skip + count)?])?;
        exact.reshape(shape).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file(bytes: &[u8]) -> (tempfile::NamedTempFile, MappedFile) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let mapped = MappedFile::open(file.path()).unwrap();
        (file, mapped)
    }

    /// Every offset and length, so that tensors begin and end at, before and after word boundaries.
    #[test]
    fn tensors_equal_the_bytes_they_lie_over() {
        let bytes: Vec<u8> = (0..61).map(|n| n * 3).collect();
        let (_file, mapped) = file(&bytes);
        let words = mapped.words().unwrap();
        for element in [1, 2, 4] {
            let dtype = [Dtype::Uint8, Dtype::Uint16, Dtype::Uint32][element / 2];
            for offset in 0..bytes.len() {
                for count in 1..=(bytes.len() - offset) / element {
                    let shape = [count as i32];
                    let found = words
                        .tensor(&MappedTensor {
                            offset,
                            dtype,
                            element,
                            shape: &shape,
                        })
                        .unwrap();
                    assert_eq!(found.is_some(), offset % element == 0);
                    let Some(found) = found else { continue };
                    let expected: Vec<u32> = bytes[offset..offset + count * element]
                        .chunks(element)
                        .map(|raw| {
                            raw.iter()
                                .rev()
                                .fold(0, |value, &byte| value << 8 | u32::from(byte))
                        })
                        .collect();
                    assert_eq!(found.to_vec_cast::<u32>().unwrap(), expected);
                }
            }
        }
    }

    #[test]
    fn a_tensor_beyond_the_file_is_an_error() {
        let (_file, mapped) = file(&[0; 16]);
        let words = mapped.words().unwrap();
        let tensor = |offset, shape: &[i32]| {
            words.tensor(&MappedTensor {
                offset,
                dtype: Dtype::Uint32,
                element: 4,
                shape,
            })
        };
        assert!(tensor(0, &[4]).is_ok());
        assert!(tensor(0, &[5]).unwrap_err().what().contains("does not fit"));
        assert!(tensor(12, &[2]).is_err());
        assert!(tensor(usize::MAX - 3, &[1]).is_err());
        assert!(tensor(0, &[-1]).is_err());
    }

    /// Metal must take the pages as they are; the CPU build copies them.
    #[test]
    fn pages_are_taken_in_place_on_metal() {
        let (_file, mapped) = file(&[1; 100_001]);
        assert_eq!(
            mapped.words().unwrap().in_place(),
            crate::runtime().unwrap().device == "metal"
        );
    }

    #[test]
    fn arrays_outlive_the_mapping_handle() {
        let (_file, mapped) = file(&[7; 64]);
        let words = mapped.words().unwrap();
        let tensor = words
            .tensor(&MappedTensor {
                offset: 8,
                dtype: Dtype::Uint8,
                element: 1,
                shape: &[2, 3],
            })
            .unwrap()
            .unwrap();
        drop((mapped, words));
        assert_eq!(tensor.to_vec_cast::<u32>().unwrap(), [7; 6]);
    }

    #[test]
    fn an_empty_or_missing_file_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(
            MappedFile::open(file.path())
                .unwrap_err()
                .to_string()
                .contains("empty")
        );
        assert!(MappedFile::open(Path::new("/nonexistent/model.safetensors")).is_err());
    }
}
