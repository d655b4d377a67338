//! bf16 tiles by AMX: `tdpbf16ps` multiplies 16 × 32 by 32 × 16 in one instruction.
//!
//! Of the eight tile registers four hold a 2 × 2 square of sums, two hold A and two hold B, so each
//! loaded tile is used twice. A tile of A is 16 rows of 64 bytes as they lie in memory, a tile of B
//! is 16 rows of pairs of a panel, which lie side by side: neither needs more than the packed forms
//! that the other kernels use. Rows and pairs that do not fill a tile go through a padded copy;
//! blocks are chosen so that this is the exception.
//!
//! The compiler has no stable intrinsics for tiles, and none of its own code touches them; the
//! instructions stand behind [`Unit`], so that an emulation runs the same blocking in tests on
//! processors without AMX.

use half::bf16;

use super::{Kernel, Product};
use crate::simd::vector::{Avx512, Simd, WIDTH};

/// Rows of a tile, and 32-bit words in a row.
const TILE: usize = 16;

/// What `ldtilecfg` reads: palette 1, every tile 16 rows of 64 bytes.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// The one configuration that is used.
static FULL: Config = {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    let mut tile = 0;
    while tile < 8 {
        row_bytes[tile] = 4 * TILE as u16;
        rows[tile] = TILE as u8;
        tile += 1;
    }
    Config {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes,
        rows,
    }
};

/// Operations on eight tile registers of the calling thread, named by number.
pub trait Unit: Copy + Send + Sync + 'static {
    /// Vectors for what is around the products.
    type Simd: Simd;

    /// Their token.
    fn simd(self) -> Self::Simd;

    /// Configures the tiles of this thread.
    fn configure(self, config: &'static Config);

    /// Returns the tiles to their initial state, so that a switch of threads need not save them.
    fn release(self);

    /// Fills a tile with zeros.
    fn zero<const T: usize>(self);

    /// Reads 16 rows of 64 bytes, `stride` bytes apart.
    ///
    /// # Safety
    /// All of them are valid.
    unsafe fn load<const T: usize>(self, from: *const u8, stride: usize);

    /// Writes 16 rows of 64 bytes, `stride` bytes apart.
    ///
    /// # Safety
    /// All of them are valid.
    unsafe fn store<const T: usize>(self, to: *mut u8, stride: usize);

    /// `C += A · B` with bf16 pairs.
    fn dot<const C: usize, const A: usize, const B: usize>(self);
}

/// Tiles of the processor.
#[derive(Clone, Copy, Debug)]
pub struct Hardware(Avx512<true>);

/// Whether processor and system have AMX with bf16 products, and they come out right. Asks the
/// system for the tiles' state.
pub fn available(simd: Avx512<true>) -> bool {
    granted() && is_right(Tiles(Hardware(simd)))
}

/// Whether the processor has AMX with bf16 products, and the system lets this process use them.
fn granted() -> bool {
    /// `arch_prctl` with `ARCH_REQ_XCOMP_PERM` for XTILEDATA.
    const REQUEST: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    let leaf = std::arch::x86_64::__cpuid_count(7, 0);
    let (bf16, tile) = (leaf.edx >> 22 & 1 == 1, leaf.edx >> 24 & 1 == 1);
    if !(bf16 && tile && cfg!(target_os = "linux")) {
        return false;
    }
    // SAFETY: asks for a permission of this process and touches no memory; fails harmlessly.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
}

impl Unit for Hardware {
    type Simd = Avx512<true>;

    #[inline(always)]
    fn simd(self) -> Self::Simd {
        self.0
    }

    #[inline(always)]
    fn configure(self, config: &'static Config) {
        // SAFETY: the token proves AMX; the configuration is a valid one of 64 bytes.
        unsafe {
            std::arch::asm!("ldtilecfg [{}]", in(reg) config, options(nostack, preserves_flags));
        }
    }

    #[inline(always)]
    fn release(self) {
        // SAFETY: as above; the compiler keeps nothing in tiles.
        unsafe { std::arch::asm!("tilerelease", options(nostack, nomem, preserves_flags)) }
    }

    #[inline(always)]
    fn zero<const T: usize>(self) {
        // SAFETY: as above.
        unsafe {
            std::arch::asm!("tilezero tmm{}", const T, options(nostack, nomem, preserves_flags));
        }
    }

    #[inline(always)]
    unsafe fn load<const T: usize>(self, from: *const u8, stride: usize) {
        // SAFETY: as above; the caller promises the rows.
        unsafe {
            std::arch::asm!("tileloadd tmm{}, [{} + {}*1]", const T, in(reg) from, in(reg) stride,
                options(nostack, readonly, preserves_flags));
        }
    }

    #[inline(always)]
    unsafe fn store<const T: usize>(self, to: *mut u8, stride: usize) {
        // SAFETY: as above; the caller promises the rows.
        unsafe {
            std::arch::asm!("tilestored [{} + {}*1], tmm{}", in(reg) to, in(reg) stride, const T,
                options(nostack, preserves_flags));
        }
    }

    #[inline(always)]
    fn dot<const C: usize, const A: usize, const B: usize>(self) {
        // SAFETY: as above. Volatile (no `pure`), so it keeps its place among the loads.
        unsafe {
            std::arch::asm!("tdpbf16ps tmm{}, tmm{}, tmm{}", const C, const A, const B,
                options(nostack, nomem, preserves_flags));
        }
    }
}

/// The kernel of tiles, over the processor's or emulated ones.
#[derive(Clone, Copy, Debug)]
pub struct Tiles<U>(pub(crate) U);

/// The kernel of the processor's AMX.
pub type Amx = Tiles<Hardware>;

impl Amx {
    /// The kernel, where the level in force has it.
    pub fn detect() -> Option<Amx> {
        let allowed = crate::simd::level() >= crate::simd::Level::Amx;
        let simd = Avx512::detect()?;
        allowed.then_some(Tiles(Hardware(simd)))
    }
}

/// Configured tiles of one thread.
pub struct Region<U: Unit>(U);

impl<U: Unit> Drop for Region<U> {
    fn drop(&mut self) {
        self.0.release();
    }
}

impl<U: Unit> Kernel for Tiles<U> {
    type Simd = U::Simd;
    type Element = bf16;
    type Region = Region<U>;

    // A product of tiles takes 16 cycles.
    const RATE: usize = TILE * TILE * 2 * TILE / 16;

    #[inline(always)]
    fn simd(self) -> U::Simd {
        self.0.simd()
    }

    fn enter(self) -> Region<U> {
        self.0.configure(&FULL);
        Region(self.0)
    }

    fn multiply(self, product: Product, a: &[bf16], b: &[bf16], c: &mut [f32]) {
        if product.check(a, b, c) {
            return;
        }
        for panel in (0..product.panels).step_by(2) {
            let b = &b[panel * product.b_panel..];
            for first in (0..product.rows).step_by(2 * TILE) {
                let rows = (product.rows - first).min(2 * TILE);
                let a = &a[first * product.a_row..];
                let c = &mut c[first * product.c_row + panel * WIDTH..];
                let block = Block {
                    unit: self.0,
                    product,
                    rows,
                };
                match (rows > TILE, panel + 1 < product.panels) {
                    (true, true) => block.run::<true, true>(a, b, c),
                    (true, false) => block.run::<true, false>(a, b, c),
                    (false, true) => block.run::<false, true>(a, b, c),
                    (false, false) => block.run::<false, false>(a, b, c),
                }
            }
        }
    }
}

/// Up to 2 × 2 tiles of C.
struct Block<U> {
    unit: U,
    product: Product,
    rows: usize,
}

/// A padded copy of a tile.
#[repr(align(64))]
struct Padded<T, const N: usize>([T; N]);

impl<U: Unit> Block<U> {
    /// Tiles 0..4 are sums (row-major), 4 and 5 hold A, 6 and 7 hold B.
    #[inline(always)]
    fn run<const TALL: bool, const WIDE: bool>(&self, a: &[bf16], b: &[bf16], c: &mut [f32]) {
        let unit = self.unit;
        self.start::<0>(c, 0, 0);
        if WIDE {
            self.start::<1>(c, 0, 1);
        }
        if TALL {
            self.start::<2>(c, 1, 0);
        }
        if TALL && WIDE {
            self.start::<3>(c, 1, 1);
        }
        for k in (0..self.product.k).step_by(2 * TILE) {
            self.load_a::<4>(a, 0, k);
            self.load_b::<6>(b, 0, k);
            unit.dot::<0, 4, 6>();
            if WIDE {
                self.load_b::<7>(b, 1, k);
                unit.dot::<1, 4, 7>();
            }
            if TALL {
                self.load_a::<5>(a, 1, k);
                unit.dot::<2, 5, 6>();
            }
            if TALL && WIDE {
                unit.dot::<3, 5, 7>();
            }
        }
        self.finish::<0>(c, 0, 0);
        if WIDE {
            self.finish::<1>(c, 0, 1);
        }
        if TALL {
            self.finish::<2>(c, 1, 0);
        }
        if TALL && WIDE {
            self.finish::<3>(c, 1, 1);
        }
    }

    /// Rows of this block in its tile row `i`.
    #[inline(always)]
    fn tile_rows(&self, i: usize) -> usize {
        (self.rows - i * TILE).min(TILE)
    }

    #[inline(always)]
    fn start<const T: usize>(&self, c: &[f32], i: usize, j: usize) {
        if !self.product.add {
            return self.unit.zero::<T>();
        }
        let (rows, stride) = (self.tile_rows(i), self.product.c_row);
        let c = &c[i * TILE * stride + j * WIDTH..];
        if rows == TILE {
            // SAFETY: `Product::check` proved sixteen rows of sixteen numbers here.
            return unsafe { self.unit.load::<T>(c.as_ptr().cast(), 4 * stride) };
        }
        let mut copy = Padded([0f32; TILE * TILE]);
        for r in 0..rows {
            copy.0[r * TILE..][..TILE].copy_from_slice(&c[r * stride..][..TILE]);
        }
        // SAFETY: the copy is a whole tile.
        unsafe { self.unit.load::<T>(copy.0.as_ptr().cast(), 4 * TILE) }
    }

    #[inline(always)]
    fn finish<const T: usize>(&self, c: &mut [f32], i: usize, j: usize) {
        let (rows, stride) = (self.tile_rows(i), self.product.c_row);
        let c = &mut c[i * TILE * stride + j * WIDTH..];
        if rows == TILE {
            // SAFETY: as in `start`.
            return unsafe { self.unit.store::<T>(c.as_mut_ptr().cast(), 4 * stride) };
        }
        let mut copy = Padded([0f32; TILE * TILE]);
        // SAFETY: the copy is a whole tile.
        unsafe { self.unit.store::<T>(copy.0.as_mut_ptr().cast(), 4 * TILE) };
        for r in 0..rows {
            c[r * stride..][..TILE].copy_from_slice(&copy.0[r * TILE..][..TILE]);
        }
    }

    #[inline(always)]
    fn load_a<const T: usize>(&self, a: &[bf16], i: usize, k: usize) {
        let (rows, stride) = (self.tile_rows(i), self.product.a_row);
        let (a, width) = (
            &a[i * TILE * stride + k..],
            (self.product.k - k).min(2 * TILE),
        );
        if rows == TILE && width == 2 * TILE {
            // SAFETY: `Product::check` proved sixteen rows of `k` numbers, of which 32 are left.
            return unsafe { self.unit.load::<T>(a.as_ptr().cast(), 2 * stride) };
        }
        let mut copy = Padded([bf16::ZERO; 2 * TILE * TILE]);
        for r in 0..rows {
            copy.0[r * 2 * TILE..][..width].copy_from_slice(&a[r * stride..][..width]);
        }
        // SAFETY: the copy is a whole tile.
        unsafe { self.unit.load::<T>(copy.0.as_ptr().cast(), 4 * TILE) }
    }

    #[inline(always)]
    fn load_b<const T: usize>(&self, b: &[bf16], j: usize, k: usize) {
        let b = &b[j * self.product.b_panel + k * WIDTH..];
        let len = (self.product.k - k).min(2 * TILE) * WIDTH;
        if len == 2 * TILE * WIDTH {
            // SAFETY: `Product::check` proved `k` rows of the panel, of which 32 are left.
            return unsafe { self.unit.load::<T>(b.as_ptr().cast(), 4 * WIDTH) };
        }
        let mut copy = Padded([bf16::ZERO; 2 * TILE * WIDTH]);
        copy.0[..len].copy_from_slice(&b[..len]);
        // SAFETY: the copy is a whole tile.
        unsafe { self.unit.load::<T>(copy.0.as_ptr().cast(), 4 * WIDTH) }
    }
}

/// Whether a kernel multiplies right: tiles that are full and tiles that are not, written and added
/// to. Whole numbers, so that every order of summation gives the same.
fn is_right(kernel: impl Kernel<Element = bf16>) -> bool {
    const ROWS: usize = 2 * TILE + 4;
    const PANELS: usize = 3;
    const K: usize = 2 * 2 * TILE + 6;
    const WIDE: usize = PANELS * WIDTH;
    let number = |i: usize| (i * 7 % 13) as f32 - 6.0;
    let numbers = |len| (0..len).map(|i| bf16::from_f32(number(i)));
    let a: Vec<bf16> = numbers(ROWS * K).collect();
    let b: Vec<bf16> = numbers(K * WIDE).collect();
    let mut c = vec![f32::NAN; ROWS * WIDE];
    let _region = kernel.enter();
    for add in [false, true] {
        let product = Product {
            rows: ROWS,
            panels: PANELS,
            k: K,
            a_row: K,
            b_panel: K * WIDTH,
            c_row: WIDE,
            add,
        };
        kernel.multiply(product, &a, &b, &mut c);
    }
    c.iter().enumerate().all(|(at, &twice)| {
        let (row, column) = (at / WIDE, at % WIDE);
        let panel = &b[column / WIDTH * K * WIDTH..];
        let term = |k: usize| {
            let b = panel[(k / 2 * WIDTH + column % WIDTH) * 2 + k % 2];
            a[row * K + k].to_f32() * b.to_f32()
        };
        twice == 2.0 * (0..K).map(term).sum::<f32>()
    })
}

#[cfg(test)]
pub(crate) mod emulated {
    //! Tiles in software.
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use std::cell::RefCell;

    use super::*;
    use crate::simd::vector::Portable;

    /// Rows of 64 bytes.
    type Tile = [[u8; 64]; TILE];

    thread_local! {
        static TILES: RefCell<Option<[Tile; 8]>> = const { RefCell::new(None) };
    }

    /// Tiles in software; asserts that they are configured when used.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Emulated;

    fn with<R>(f: impl FnOnce(&mut [Tile; 8]) -> R) -> R {
        TILES.with_borrow_mut(|tiles| f(tiles.as_mut().expect("the tiles are not configured")))
    }

    fn word(tile: &Tile, row: usize, at: usize) -> u32 {
        u32::from_le_bytes(*tile[row][4 * at..].first_chunk().unwrap())
    }

    impl Unit for Emulated {
        type Simd = Portable;

        fn simd(self) -> Portable {
            Portable
        }

        fn configure(self, config: &'static Config) {
            assert_eq!(size_of_val(config), 64);
            assert_eq!((config.palette, config.start_row), (1, 0));
            assert_eq!(config.reserved, [0; 14]);
            assert!(config.row_bytes[..8].iter().all(|&bytes| bytes == 64));
            assert!(config.rows[..8].iter().all(|&rows| rows == 16));
            TILES.set(Some([[[0; 64]; TILE]; 8]));
        }

        fn release(self) {
            TILES.set(None);
        }

        fn zero<const T: usize>(self) {
            with(|tiles| tiles[T] = [[0; 64]; TILE]);
        }

        unsafe fn load<const T: usize>(self, from: *const u8, stride: usize) {
            with(|tiles| {
                for (r, row) in tiles[T].iter_mut().enumerate() {
                    // SAFETY: the caller promises the rows.
                    *row = unsafe { from.add(r * stride).cast::<[u8; 64]>().read() };
                }
            });
        }

        unsafe fn store<const T: usize>(self, to: *mut u8, stride: usize) {
            with(|tiles| {
                for (r, row) in tiles[T].iter().enumerate() {
                    // SAFETY: the caller promises the rows.
                    unsafe { to.add(r * stride).cast::<[u8; 64]>().write(*row) };
                }
            });
        }

        fn dot<const C: usize, const A: usize, const B: usize>(self) {
            with(|tiles| {
                let (a, b) = (tiles[A], tiles[B]);
                for (m, row) in tiles[C].iter_mut().enumerate() {
                    for n in 0..TILE {
                        let cell = row[4 * n..].first_chunk_mut::<4>().unwrap();
                        let mut sum = f32::from_le_bytes(*cell);
                        for k in 0..TILE {
                            let (x, y) = (word(&a, m, k), word(&b, k, n));
                            for shift in [0, 16] {
                                let half = |w: u32| f32::from_bits((w >> shift & 0xffff) << 16);
                                sum += half(x) * half(y);
                            }
                        }
                        *cell = sum.to_le_bytes();
                    }
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn the_blocking_is_right_on_emulated_tiles() {
        super::super::tests::check(Tiles(emulated::Emulated));
    }

    #[test]
    fn tiles_are_checked_before_they_are_used() {
        /// Forgets a part of its sums.
        #[derive(Clone, Copy)]
        struct Forgetful<K>(K, fn(&mut Product));
        impl<K: Kernel> Kernel for Forgetful<K> {
            type Simd = K::Simd;
            type Element = K::Element;
            type Region = K::Region;
            const RATE: usize = K::RATE;
            fn simd(self) -> K::Simd {
                self.0.simd()
            }
            fn enter(self) -> K::Region {
                self.0.enter()
            }
            fn multiply(
                self,
                mut product: Product,
                a: &[K::Element],
                b: &[K::Element],
                c: &mut [f32],
            ) {
                self.1(&mut product);
                self.0.multiply(product, a, b, c);
            }
        }
        let tiles = Tiles(emulated::Emulated);
        assert!(is_right(tiles));
        assert!(is_right(Forgetful(tiles, |_| ())));
        for mistake in [
            (|product| product.add = false) as fn(&mut Product),
            |product| product.rows = 32,
            |product| product.panels = 2,
            |product| product.k -= 2,
        ] {
            assert!(!is_right(Forgetful(tiles, mistake)));
        }
    }
}
