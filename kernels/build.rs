//! Compiles the C++ shim against libtorch's headers and gives the binaries and tests of this
//! package the run-time path of libtorch.

use std::path::{Path, PathBuf};

/// The files of the shim.
const SHIM: [&str; 11] = [
    "allocator",
    "attention",
    "device",
    "device_memory",
    "generator",
    "host_waits",
    "numerics",
    "product",
    "stream",
    "transfer",
    "upload",
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/shim");
    println!("cargo:rerun-if-env-changed=LIBTORCH_INCLUDE");
    println!("cargo:rerun-if-env-changed=LIBTORCH_CXX11_ABI");
    // torch-sys has already settled where libtorch lies; asking it keeps one answer for both.
    let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") else {
        println!("cargo:warning=torch-sys told no library folder: the shim is not compiled");
        return;
    };
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");

    let include = match std::env::var_os("LIBTORCH_INCLUDE") {
        Some(root) => PathBuf::from(root).join("include"),
        None => Path::new(&lib).with_file_name("include"),
    };
    let abi = std::env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_owned());
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        .flag(format!("-isystem{}", include.display()))
        .files(SHIM.map(|name| format!("src/shim/{name}.cpp")))
        .compile("oxitron_shim");
    println!("cargo:rustc-link-lib=c10");
}
