//! The rates that ops are held against, measured on this machine with all threads at once.
//!
//! * **Products**: the micro-kernels of this crate, on operands that stay in L1: as much as the
//!   registers and the execution units give. A whole matrix product has to bring its operands there,
//!   too.
//! * **Memory**: three ways through buffers of several times L3, because a write costs a read where
//!   the old contents are not in a cache. Bytes are counted as the ops count them, each operand read
//!   or written once: `triad` (`a = b + s·c`) moves a third more than that, `update`
//!   (`a = a + s·b`) and `read` do not.

use std::hint::black_box;
use std::time::{Duration, Instant};

use oxitron_kernels::microkernel::{Element, Kernel, Product, fp32::Fp32};
use oxitron_kernels::simd;
use oxitron_kernels::simd::vector::{Portable, Simd, WIDTH};
use oxitron_kernels::sys::parallel::{parallel_for, parallel_split};
use oxitron_kernels::sys::split::Rows;
use tch::Kind;

/// How long products are timed.
const SLICE: Duration = Duration::from_millis(10);

/// What the operands of one product may take of L1, the smallest of which has 32 KiB.
const OPERAND_BYTES: usize = 24 << 10;

/// Rows and panels of products that are tried. Register tiles are 8 × 2 of most vectors, 32 × 2 of
/// AMX.
const SHAPES: [(usize, usize); 5] = [(8, 2), (12, 1), (16, 2), (32, 2), (16, 4)];

/// Products between two looks at the clock.
const BATCH: usize = 64;

/// Elements that a thread takes at a time on its way through memory.
const GRAIN: usize = 1 << 14;

/// What limits an op.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Floor {
    /// Products of fp32.
    Fp32,
    /// Products of bf16.
    Bf16,
    /// Memory that is only read.
    Read,
    /// Memory that is read, and other memory that is written.
    Triad,
    /// Memory of which a part is read and written in place.
    Update,
}

impl Floor {
    pub const ALL: [Floor; 5] = [
        Floor::Bf16,
        Floor::Fp32,
        Floor::Read,
        Floor::Triad,
        Floor::Update,
    ];

    /// Products of a dtype.
    pub fn products(kind: Kind) -> Floor {
        match kind {
            Kind::BFloat16 => Floor::Bf16,
            _ => Floor::Fp32,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Floor::Fp32 => "fp32 products",
            Floor::Bf16 => "bf16 products",
            Floor::Read => "read",
            Floor::Triad => "triad",
            Floor::Update => "update",
        }
    }

    pub fn unit(self) -> &'static str {
        match self {
            Floor::Fp32 | Floor::Bf16 => "GFLOP/s",
            _ => "GB/s",
        }
    }
}

/// Whatever it takes to measure a floor again and again.
pub struct Floors {
    fp32: Products,
    bf16: Products,
    memory: Memory,
}

impl Floors {
    pub fn new(threads: usize) -> Floors {
        Floors {
            fp32: fp32_products(threads),
            bf16: bf16_products(threads),
            memory: Memory::new(),
        }
    }

    /// Bytes that an op must move so that caches hardly help: several times L3.
    pub fn large(&self) -> usize {
        self.memory.bytes
    }

    /// The rate right now, in [`Floor::unit`].
    pub fn rate(&mut self, floor: Floor) -> f64 {
        match floor {
            Floor::Fp32 => (self.fp32)(),
            Floor::Bf16 => (self.bf16)(),
            Floor::Read => self.memory.read(),
            Floor::Triad => self.memory.triad(),
            Floor::Update => self.memory.update(),
        }
    }
}

/// Measures the products of one kernel, in GFLOP/s of all threads.
type Products = Box<dyn Fn() -> f64>;

/// The kernel that fp32 operands get.
fn fp32_products(threads: usize) -> Products {
    #[cfg(target_arch = "x86_64")]
    {
        use oxitron_kernels::simd::vector::{Avx2, Avx512};
        if let Some(simd) = Avx512::<false>::detect() {
            return fastest(Fp32(simd), threads);
        }
        if let Some(simd) = Avx2::detect() {
            return fastest(Fp32(simd), threads);
        }
    }
    fastest(Fp32(Portable), threads)
}

/// The kernel that bf16 operands get: that of fp32 where the processor has none for them.
fn bf16_products(threads: usize) -> Products {
    #[cfg(target_arch = "x86_64")]
    {
        use oxitron_kernels::microkernel::{amx::Amx, dot::Dot};
        if let Some(kernel) = Amx::detect() {
            return fastest(kernel, threads);
        }
        if let Some(kernel) = Dot::detect() {
            return fastest(kernel, threads);
        }
    }
    fp32_products(threads)
}

/// The products of the shape that is fastest.
fn fastest<K: Kernel>(kernel: K, threads: usize) -> Products {
    let rate = |shape| rate_of_products(kernel, threads, shape);
    let best_of_three = |shape| (0..3).map(|_| rate(shape)).fold(0.0, f64::max);
    let rates = SHAPES.map(|shape| (shape, best_of_three(shape)));
    let (shape, _) = rates
        .into_iter()
        .fold((SHAPES[0], 0.0), |a, b| if b.1 > a.1 { b } else { a });
    Box::new(move || rate_of_products(kernel, threads, shape))
}

fn rate_of_products<K: Kernel>(kernel: K, threads: usize, shape: (usize, usize)) -> f64 {
    let product = product_in_l1::<K::Element>(shape);
    let mut rates = vec![0.0; threads];
    parallel_split(threads, 1, Rows::new(&mut rates, 1), |_, rates| {
        for rate in rates {
            *rate = rate_of_a_thread(kernel, product);
        }
    });
    rates.iter().sum()
}

/// The longest product of these rows and panels that fits.
fn product_in_l1<E: Element>((rows, panels): (usize, usize)) -> Product {
    let width = panels * WIDTH;
    let k = (OPERAND_BYTES - 4 * rows * width) / ((rows + width) * size_of::<E>());
    let k = k / 32 * 32;
    Product {
        rows,
        panels,
        k,
        a_row: k,
        b_panel: WIDTH * k,
        c_row: width,
        add: false,
    }
}

fn rate_of_a_thread<K: Kernel>(kernel: K, product: Product) -> f64 {
    let (rows, width, k) = (product.rows, product.c_row, product.k);
    let (a, b) = (halves(kernel, rows * k), halves(kernel, width * k));
    let mut c = vec![0.0; rows * width];
    let _region = kernel.enter();
    let mut products = 0;
    let begun = Instant::now();
    while begun.elapsed() < SLICE {
        for _ in 0..BATCH {
            kernel.multiply(product, black_box(&a), black_box(&b), black_box(&mut c));
        }
        products += BATCH;
    }
    1e-9 * (2 * rows * width * k * products) as f64 / begun.elapsed().as_secs_f64()
}

/// An operand, whole vectors of a number that is not zero: zeros draw less power.
fn halves<K: Kernel>(kernel: K, len: usize) -> Vec<K::Element> {
    let mut operand = vec![K::Element::default(); len];
    for vector in operand.chunks_exact_mut(WIDTH) {
        K::Element::store(kernel.simd(), kernel.simd().splat(0.5), vector);
    }
    operand
}

/// Three buffers that no cache holds.
struct Memory {
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
    /// Of one buffer.
    bytes: usize,
}

impl Memory {
    fn new() -> Memory {
        let bytes = (4 * l3_bytes()).clamp(64 << 20, 1 << 30);
        let buffer = || {
            let mut buffer = vec![0.0; bytes / size_of::<f32>()];
            // Pages lie near the thread that touches them first, which is the one that will use them.
            in_parallel(&mut buffer, |_, part| part.fill(1.0));
            buffer
        };
        let (a, b, c) = (buffer(), buffer(), buffer());
        Memory { a, b, c, bytes }
    }

    fn read(&mut self) -> f64 {
        let (a, begun) = (&self.a, Instant::now());
        let blocks = a.len().div_ceil(GRAIN);
        parallel_for(blocks, 1, |range| {
            for block in a[range.start * GRAIN..].chunks(GRAIN).take(range.len()) {
                black_box(simd::sum(block, |x| x));
            }
        });
        self.rate(1, begun)
    }

    fn triad(&mut self) -> f64 {
        let (b, c, begun) = (&self.b, &self.c, Instant::now());
        let factor = black_box(0.5);
        in_parallel(&mut self.a, |at, a| {
            for ((a, b), c) in a.iter_mut().zip(&b[at..]).zip(&c[at..]) {
                *a = b + factor * c;
            }
        });
        self.rate(3, begun)
    }

    fn update(&mut self) -> f64 {
        let (b, begun) = (&self.b, Instant::now());
        let factor = black_box(1e-3);
        in_parallel(&mut self.a, |at, a| {
            for (a, b) in a.iter_mut().zip(&b[at..]) {
                *a += factor * b;
            }
        });
        self.rate(3, begun)
    }

    /// GB/s of so many passes over a buffer.
    fn rate(&self, passes: usize, begun: Instant) -> f64 {
        1e-9 * (passes * self.bytes) as f64 / begun.elapsed().as_secs_f64()
    }
}

/// Hands each thread its part of a buffer, and where it begins.
fn in_parallel(buffer: &mut [f32], body: impl Fn(usize, &mut [f32]) + Sync) {
    let blocks = buffer.len().div_ceil(GRAIN);
    parallel_split(blocks, 1, Rows::new(buffer, GRAIN), |range, part| {
        body(range.start * GRAIN, part);
    });
}

/// The last cache, as Linux tells it; else 32 MiB.
fn l3_bytes() -> usize {
    let path = "/sys/devices/system/cpu/cpu0/cache/index3/size";
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let kibibytes = text.trim().strip_suffix('K').and_then(|n| n.parse().ok());
    kibibytes.unwrap_or(32 << 10) << 10
}
