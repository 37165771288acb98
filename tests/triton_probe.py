"""Two kernels for the tests of the Triton machinery itself."""

import triton
import triton.language as tl


@triton.jit
def matmul_kernel(a, b, c, K, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        left = tl.load(a + rows[:, None] * K + k + rows[None, :])
        right = tl.load(b + (k + rows[:, None]) * BLOCK + rows[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + rows[:, None] * BLOCK + rows[None, :], total.to(c.dtype.element_ty))


@triton.jit
def spilling_kernel(a, c, BLOCK: tl.constexpr):
    """Holds far more numbers than a thread has registers."""
    rows = tl.arange(0, BLOCK)
    x = tl.load(a + rows)
    y = tl.load(a + BLOCK + rows)
    z = tl.load(a + 2 * BLOCK + rows)
    tl.debug_barrier()
    for _ in range(tl.load(c).to(tl.int32)):
        x, y, z = y * z + tl.sum(x), z * x + tl.sum(y), x * y + tl.sum(z)
    tl.store(c + rows, x + y + z)
