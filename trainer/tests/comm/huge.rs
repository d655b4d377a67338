//! More elements than 32 bits can count.

use oxitron_trainer::comm::Comm;
use tch::{Device, Kind, Tensor};

use super::suite::each_rank;

/// Elements of each of two slices: together one more than 2^31, plus one.
const SLICE: i64 = (1 << 30) + 1;

/// Elements that have the same value. No multiple of a chunk, nor the other way round, so that a
/// chunk that landed elsewhere shows.
const RUN: i64 = 999_983;

/// The memory that this takes (two buffers of 2 GiB), with some to spare.
const NEEDED_BYTES: u64 = 5 << 30;

fn available_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kibibytes = line.unwrap().trim().trim_end_matches(" kB");
    kibibytes.parse::<u64>().unwrap() << 10
}

/// The value of the elements from `start`; never 0, which nothing received would look like.
fn value(start: i64) -> i64 {
    1 + start / RUN % 251
}

/// Starts and lengths of the runs of equal values between `from` and `to`.
fn runs(from: i64, to: i64) -> impl Iterator<Item = (i64, i64)> {
    let first = from / RUN * RUN;
    (first..to).step_by(RUN as usize).map(move |start| {
        let (start, end) = (start.max(from), (start + RUN).min(to));
        (start, end - start)
    })
}

/// An all-gather of bytes on two ranks that are threads.
pub fn all_gather() {
    let available = available_bytes();
    if available < NEEDED_BYTES {
        println!(
            "skipped: an all-gather of more than 2^31 elements needs {} MiB, {} MiB are available",
            NEEDED_BYTES >> 20,
            available >> 20
        );
        return;
    }
    each_rank(Comm::threads(2).unwrap(), |comm| {
        let lane = comm.lane(&[0, 1]).unwrap();
        let buffer = Tensor::zeros([2 * SLICE], (Kind::Uint8, Device::Cpu));
        let own = lane.index() as i64 * SLICE;
        for (start, length) in runs(own, own + SLICE) {
            let _ = buffer.narrow(0, start, length).fill_(value(start));
        }
        let (gathered, traffic) = lane.all_gather(buffer).wait().unwrap();
        assert_eq!(traffic.bytes_sent, SLICE as u64);
        // The own slice is as it was unless a chunk went astray, so both are looked at.
        for (start, length) in runs(0, SLICE).chain(runs(SLICE, 2 * SLICE)) {
            let run = gathered.narrow(0, start, length);
            let expected = value(start);
            assert_eq!(run.min().int64_value(&[]), expected, "from {start}");
            assert_eq!(run.max().int64_value(&[]), expected, "from {start}");
        }
        comm.finish().unwrap();
    });
}
