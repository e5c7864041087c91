//! Kernels of our own, compiled by MLX when they are first used: CUDA source on its CUDA build, Metal source on Apple's.
//!
//! A kernel's source is part of this program and trusted as such: what it reads and writes on the device nobody checks.
//! What is checked is that it gets as many inputs as it names. Inputs are made contiguous first.
//!
//! Two things to know about order. MLX orders operations by the buffers that they take and give. A kernel that writes to
//! an *input* (a cache that is appended to in place) does so unseen: whoever is to find it written has to take an output of
//! that kernel too, directly or by way of other operations, and whoever writes there after it as well. On CUDA a later
//! evaluation on the same stream comes after it in any case. On Metal it may overlap where MLX sees no buffer in common:
//! wait for the kernel's outputs first.

use crate::error;
use mlx_rs::error::{Exception, Result};
use mlx_rs::{Array, Device, DeviceType, Dtype, Stream};
use std::ffi::{CString, c_char};

/// Whose language a kernel is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Language {
    /// CUDA C++.
    Cuda,
    /// Metal shading language.
    Metal,
}

impl Language {
    /// The one that the default device runs; `None` on a CPU.
    ///
    /// # Errors
    ///
    /// MLX has no device.
    pub fn of_device() -> Result<Option<Self>> {
        Ok(match Device::try_default()?.get_type()? {
            DeviceType::Cpu => None,
            DeviceType::Gpu if cfg!(target_os = "macos") => Some(Self::Metal),
            DeviceType::Gpu => Some(Self::Cuda),
        })
    }
}

/// What a kernel is made of.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// Letters, digits and `_`; different for different kernels.
    pub name: &'a str,
    /// Names of the inputs, as the body knows them: pointers to their elements. `NAME_shape` in the body is the shape.
    pub inputs: &'a [&'a str],
    /// Names of the outputs, likewise.
    pub outputs: &'a [&'a str],
    /// What stands before the kernel.
    pub header: &'a str,
    /// What stands between its braces.
    pub body: &'a str,
}

/// How a kernel is started, and what it gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Threads along each axis, a multiple of those of a group.
    pub grid: [i32; 3],
    /// Threads of a group along each axis.
    pub group: [i32; 3],
    /// Shape and type of each output. Its elements are whatever the kernel writes, undefined where it writes nothing.
    pub outputs: Vec<(Vec<i32>, Dtype)>,
}

/// A kernel, ready to be applied.
#[derive(Debug)]
pub struct Kernel {
    handle: Handle,
    name: String,
    inputs: usize,
}

#[derive(Debug)]
enum Handle {
    Cuda(mlx_sys::mlx_fast_cuda_kernel),
    Metal(mlx_sys::mlx_fast_metal_kernel),
}

// SAFETY: the handle owns a C++ function object that is bound to no thread; `Kernel` is not `Sync`, so that one thread at
// a time uses it.
unsafe impl Send for Kernel {}

impl Kernel {
    /// A kernel in the default device's language. Its source is compiled when it is first evaluated; what is wrong with it
    /// shows then.
    ///
    /// # Errors
    ///
    /// There is no GPU, or a text contains a zero byte.
    pub fn new(source: &Source<'_>) -> Result<Self> {
        let Some(language) = Language::of_device()? else {
            return Err(Exception::custom("there are no kernels for the CPU"));
        };
        let (name, header, body) = (text(source.name)?, text(source.header)?, text(source.body)?);
        let (inputs, outputs) = (Names::new(source.inputs)?, Names::new(source.outputs)?);
        let mut handle = None;
        error::check(|| {
            // SAFETY: all texts are zero-terminated and, like the vectors, alive for the call, which copies them.
            let (made, is_null) = unsafe {
                match language {
                    Language::Cuda => {
                        let kernel = mlx_sys::mlx_fast_cuda_kernel_new(
                            name.as_ptr(),
                            inputs.0,
                            outputs.0,
                            body.as_ptr(),
                            header.as_ptr(),
                            true,
                            0,
                        );
                        (Handle::Cuda(kernel), kernel.ctx.is_null())
                    }
                    Language::Metal => {
                        let kernel = mlx_sys::mlx_fast_metal_kernel_new(
                            name.as_ptr(),
                            inputs.0,
                            outputs.0,
                            body.as_ptr(),
                            header.as_ptr(),
                            true,
                            false,
                        );
                        (Handle::Metal(kernel), kernel.ctx.is_null())
                    }
                }
            };
            handle = Some(made);
            i32::from(is_null)
        })?;
        let handle = handle.ok_or_else(|| Exception::custom("MLX made no kernel"))?;
        Ok(Self {
            handle,
            name: source.name.to_owned(),
            inputs: source.inputs.len(),
        })
    }

    /// The kernel's outputs for these inputs, as a lazy graph.
    ///
    /// # Errors
    ///
    /// Another number of inputs than the kernel names, or MLX's own.
    pub fn apply(&self, inputs: &[&Array], launch: &Launch) -> Result<Vec<Array>> {
        if inputs.len() != self.inputs {
            return Err(Exception::custom(format!(
                "kernel {}: {} inputs instead of {}",
                self.name,
                inputs.len(),
                self.inputs
            )));
        }
        let stream = Stream::thread_local_or_default();
        let inputs = Arrays::of(inputs);
        let mut outputs = Arrays::empty();
        let config = Config::new(&self.handle, launch)?;
        error::check(|| {
            // SAFETY: all handles are alive for the call.
            unsafe {
                match (&self.handle, &config) {
                    (Handle::Cuda(kernel), Config::Cuda(config)) => mlx_sys::mlx_fast_cuda_kernel_apply(
                        &mut outputs.0,
                        *kernel,
                        inputs.0,
                        *config,
                        stream.as_ptr(),
                    ),
                    (Handle::Metal(kernel), Config::Metal(config)) => mlx_sys::mlx_fast_metal_kernel_apply(
                        &mut outputs.0,
                        *kernel,
                        inputs.0,
                        *config,
                        stream.as_ptr(),
                    ),
                    _ => 1,
                }
            }
        })?;
        outputs.take()
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        // SAFETY: the handle is owned and freed once.
        unsafe {
            match self.handle {
                Handle::Cuda(kernel) => mlx_sys::mlx_fast_cuda_kernel_free(kernel),
                Handle::Metal(kernel) => mlx_sys::mlx_fast_metal_kernel_free(kernel),
            }
        }
    }
}

enum Config {
    Cuda(mlx_sys::mlx_fast_cuda_kernel_config),
    Metal(mlx_sys::mlx_fast_metal_kernel_config),
}

impl Config {
    fn new(handle: &Handle, launch: &Launch) -> Result<Self> {
        let ([x, y, z], [a, b, c]) = (launch.grid, launch.group);
        // The two kinds have functions of the same shapes under different names.
        macro_rules! configured {
            ($kind:ident, $new:ident, $set_grid:ident, $set_group:ident, $add_output:ident) => {{
                let raw = mlx_sys::$new();
                // Its owner from here on, whatever fails.
                let config = Self::$kind(raw);
                error::check(|| mlx_sys::$set_grid(raw, x, y, z))?;
                error::check(|| mlx_sys::$set_group(raw, a, b, c))?;
                for (shape, dtype) in &launch.outputs {
                    error::check(|| mlx_sys::$add_output(raw, shape.as_ptr(), shape.len(), (*dtype).into()))?;
                }
                Ok(config)
            }};
        }
        // SAFETY: the configuration is made here and owned by `config`; shapes are alive for each call.
        unsafe {
            match handle {
                Handle::Cuda(_) => configured!(
                    Cuda,
                    mlx_fast_cuda_kernel_config_new,
                    mlx_fast_cuda_kernel_config_set_grid,
                    mlx_fast_cuda_kernel_config_set_thread_group,
                    mlx_fast_cuda_kernel_config_add_output_arg
                ),
                Handle::Metal(_) => configured!(
                    Metal,
                    mlx_fast_metal_kernel_config_new,
                    mlx_fast_metal_kernel_config_set_grid,
                    mlx_fast_metal_kernel_config_set_thread_group,
                    mlx_fast_metal_kernel_config_add_output_arg
                ),
            }
        }
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        // SAFETY: the configuration is owned and freed once.
        unsafe {
            match self {
                Self::Cuda(config) => mlx_sys::mlx_fast_cuda_kernel_config_free(*config),
                Self::Metal(config) => mlx_sys::mlx_fast_metal_kernel_config_free(*config),
            }
        }
    }
}

fn text(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Exception::custom("a kernel's text contains a zero byte"))
}

/// A vector of names, owned.
struct Names(mlx_sys::mlx_vector_string);

impl Names {
    fn new(names: &[&str]) -> Result<Self> {
        let texts = names.iter().map(|name| text(name)).collect::<Result<Vec<_>>>()?;
        let mut pointers: Vec<*const c_char> = texts.iter().map(|text| text.as_ptr()).collect();
        // SAFETY: as many pointers to zero-terminated texts as said, alive for the call, which copies them.
        Ok(Self(unsafe {
            mlx_sys::mlx_vector_string_new_data(pointers.as_mut_ptr(), pointers.len())
        }))
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        // SAFETY: the vector is owned and freed once.
        unsafe { mlx_sys::mlx_vector_string_free(self.0) };
    }
}

/// A vector of arrays, owned.
pub(crate) struct Arrays(pub(crate) mlx_sys::mlx_vector_array);

impl Arrays {
    pub(crate) fn empty() -> Self {
        // SAFETY: makes an empty vector.
        Self(unsafe { mlx_sys::mlx_vector_array_new() })
    }

    pub(crate) fn of(arrays: &[&Array]) -> Self {
        let handles: Vec<mlx_sys::mlx_array> = arrays.iter().map(|array| array.as_ptr()).collect();
        // SAFETY: as many live handles as said; the call takes references of its own.
        Self(unsafe { mlx_sys::mlx_vector_array_new_data(handles.as_ptr(), handles.len()) })
    }

    /// Its elements.
    pub(crate) fn take(&self) -> Result<Vec<Array>> {
        // SAFETY: the vector is alive.
        let count = unsafe { mlx_sys::mlx_vector_array_size(self.0) };
        (0..count)
            .map(|index| {
                error::array(|result| {
                    // SAFETY: the index is within the vector.
                    unsafe { mlx_sys::mlx_vector_array_get(result, self.0, index) }
                })
            })
            .collect()
    }
}

impl Drop for Arrays {
    fn drop(&mut self) {
        // SAFETY: the vector is owned and freed once.
        unsafe { mlx_sys::mlx_vector_array_free(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a GPU the kernel doubles its input and says where it got its length from; a CPU says that it has none.
    #[test]
    fn a_kernel_runs_where_there_is_a_gpu() {
        let (header, body) = match Language::of_device().unwrap() {
            Some(Language::Cuda) => ("", "int at = blockIdx.x * blockDim.x + threadIdx.x;"),
            Some(Language::Metal) => ("", "int at = thread_position_in_grid.x;"),
            None => ("", ""),
        };
        let body = format!("{body} if (at < x_shape[0]) twice[at] = x[at] + x[at];");
        let source = Source {
            name: "test_double",
            inputs: &["x"],
            outputs: &["twice"],
            header,
            body: &body,
        };
        let kernel = match Kernel::new(&source) {
            Ok(kernel) => kernel,
            Err(error) => {
                assert_eq!(Language::of_device().unwrap(), None, "{}", error.what());
                assert!(error.what().contains("CPU"), "{}", error.what());
                return;
            }
        };
        let x = Array::from_slice(&(0..40).map(|n| n as f32).collect::<Vec<_>>(), &[40]);
        let launch = Launch {
            grid: [64, 1, 1],
            group: [32, 1, 1],
            outputs: vec![(vec![40], Dtype::Float32)],
        };
        let twice = kernel.apply(&[&x], &launch).unwrap();
        let expected: Vec<f32> = (0..40).map(|n| 2.0 * n as f32).collect();
        assert_eq!(twice[0].to_vec_cast::<f32>().unwrap(), expected);
        assert!(kernel.apply(&[&x, &x], &launch).is_err());
    }
}
