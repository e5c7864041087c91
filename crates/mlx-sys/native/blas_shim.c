// Puts OpenBLAS in the place of the reference BLAS that Linux' libmlx brings: this library is linked before libmlx, so
// that the dynamic linker finds these three symbols (all that MLX takes from CBLAS) here first. The published OpenBLAS
// has every symbol under a prefix; each function here is a single jump, so no signature is repeated.
#if defined(__x86_64__)
#define JUMP(name) __asm__(".text\n.globl " #name "\n.type " #name ",@function\n" #name ": jmp scipy_" #name "@PLT\n");
#elif defined(__aarch64__)
#define JUMP(name) __asm__(".text\n.globl " #name "\n.type " #name ",%function\n" #name ": b scipy_" #name "\n");
#endif
JUMP(cblas_sgemm)
JUMP(cblas_dgemm)
JUMP(cblas_cgemm)

extern char *scipy_openblas_get_config(void);

// Also the reference that keeps this library linked (--as-needed drops what nobody names).
const char *mlx_sys_blas_config(void) { return scipy_openblas_get_config(); }

extern void scipy_openblas_set_num_threads(int count);

void mlx_sys_blas_threads(int count) { scipy_openblas_set_num_threads(count); }
