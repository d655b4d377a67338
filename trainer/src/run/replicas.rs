//! The replica check: do all ranks still hold the same weights?
//!
//! Every rank computes the same updates, or receives them, so copies differ only when something has
//! gone wrong: a processor that miscomputes, memory that forgets, a defect in this program. Such a
//! run goes on learning nonsense without any other sign; comparing hashes costs next to nothing.

use super::{RunError, control, ranks::Ranks};
use crate::plan::Mesh;
use crate::zero::{CommClock, Fingerprints, Zero};

/// Up to this size of a shard group the gathered weights are compared owner by owner, which tells
/// who is wrong when only two ranks differ. In larger groups the majority tells.
const MOST_OWNERS: usize = 16;

/// Compares the weights of all ranks; all of them call it at the same step.
///
/// # Errors
/// [`RunError::ReplicasDiffer`], on every rank, naming those that hold other weights than the rest.
pub(super) fn check(
    zero: &mut Zero,
    ranks: &Ranks,
    mesh: &Mesh,
    step: u64,
) -> Result<(), RunError> {
    if mesh.replicate == 1 && (ranks.ranks == 1 || zero.holds_slices()) {
        // Nobody holds what another holds.
        return Ok(());
    }
    let mine = zero.fingerprints()?;
    let table = exchange(&mine, ranks, &mut CommClock::default())?;
    let found = differing(&table, mesh);
    if found.is_empty() {
        return Ok(());
    }
    Err(RunError::ReplicasDiffer {
        step,
        ranks: found,
        world: ranks.ranks,
    })
}

/// The hashes of all ranks, by rank.
fn exchange(
    mine: &Fingerprints,
    ranks: &Ranks,
    clock: &mut CommClock,
) -> Result<Vec<Fingerprints>, RunError> {
    let mut gathered = mine.gathered.clone();
    if gathered.len() > MOST_OWNERS {
        let all = gathered
            .iter()
            .fold(0u64, |all, hash| all.rotate_left(5) ^ hash);
        gathered = vec![all];
    }
    let row: Vec<u64> = std::iter::once(mine.owned).chain(gathered).collect();
    // 32 bits at a time: a sum of f64 carries those exactly.
    let width = 2 * row.len();
    let mut table = vec![0.0; ranks.ranks * width];
    for (index, hash) in row.iter().enumerate() {
        let cell = ranks.rank * width + 2 * index;
        table[cell] = (hash >> 32) as f64;
        table[cell + 1] = f64::from(*hash as u32);
    }
    let table = control::sum(&ranks.world, &table, clock)?;
    let hash = |pair: &[f64]| ((pair[0] as u64) << 32) | pair[1] as u64;
    Ok(table
        .chunks(width)
        .map(|row| {
            let mut hashes = row.chunks(2).map(hash);
            Fingerprints {
                owned: hashes.next().unwrap_or_default(),
                gathered: hashes.collect(),
            }
        })
        .collect())
}

/// The ranks whose hashes differ from what most hold, in ascending order. Where as many hold one
/// value as another, the owner of the slice is right; where owners themselves disagree evenly, all
/// who hold the value are named.
fn differing(table: &[Fingerprints], mesh: &Mesh) -> Vec<usize> {
    let mut wrong = Vec::new();
    for shard_index in 0..mesh.shard {
        let group = mesh.replica_group(shard_index);
        let held: Vec<(usize, u64)> = group
            .iter()
            .map(|&rank| (rank, table[rank].owned))
            .collect();
        wrong.extend(minority(&held, &[]));
    }
    for owner in 0..table[0].gathered.len() {
        let held: Vec<(usize, u64)> = (0..table.len())
            .map(|rank| (rank, table[rank].gathered[owner]))
            .collect();
        let owners = if table[0].gathered.len() == mesh.shard {
            mesh.replica_group(owner)
        } else {
            Vec::new()
        };
        wrong.extend(minority(&held, &owners));
    }
    wrong.sort_unstable();
    wrong.dedup();
    wrong
}

/// The ranks that do not hold the value which most ranks hold, among equals which most `owners`
/// hold; all ranks if that too is undecided.
fn minority(held: &[(usize, u64)], owners: &[usize]) -> Vec<usize> {
    let votes = |value: u64| {
        let holders = held.iter().filter(|(_, other)| *other == value);
        let owning = holders.clone().filter(|(rank, _)| owners.contains(rank));
        (holders.count(), owning.count())
    };
    let most = held.iter().map(|&(_, value)| votes(value)).max();
    let mut right: Vec<u64> = held
        .iter()
        .map(|&(_, value)| value)
        .filter(|&value| Some(votes(value)) == most)
        .collect();
    right.sort_unstable();
    right.dedup();
    let is_wrong = |value: u64| right.len() > 1 || !right.contains(&value);
    held.iter()
        .filter(|&&(_, value)| is_wrong(value))
        .map(|&(rank, _)| rank)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(rows: &[(u64, &[u64])]) -> Vec<Fingerprints> {
        rows.iter()
            .map(|&(owned, gathered)| Fingerprints {
                owned,
                gathered: gathered.to_vec(),
            })
            .collect()
    }

    #[test]
    fn the_majority_is_right_and_among_two_the_owner() {
        let zero_1 = Mesh::data_parallel_groups(3, 3);
        let same = table(&[(1, &[7, 8, 9]), (2, &[7, 8, 9]), (3, &[7, 8, 9])]);
        assert!(differing(&same, &zero_1).is_empty());
        let third = table(&[(1, &[7, 8, 9]), (2, &[7, 8, 9]), (3, &[7, 5, 9])]);
        assert_eq!(differing(&third, &zero_1), [2]);

        let pair = Mesh::data_parallel_groups(2, 2);
        let second_lost_the_firsts = table(&[(1, &[7, 8]), (2, &[6, 8])]);
        assert_eq!(differing(&second_lost_the_firsts, &pair), [1]);
        let first_lost_the_seconds = table(&[(1, &[7, 5]), (2, &[7, 8])]);
        assert_eq!(differing(&first_lost_the_seconds, &pair), [0]);
    }

    #[test]
    fn replicas_of_a_slice_are_compared_and_two_that_differ_are_both_named() {
        let hybrid = Mesh::data_parallel_groups(4, 2);
        let drifted = table(&[(1, &[]), (2, &[]), (1, &[]), (3, &[])]);
        assert_eq!(differing(&drifted, &hybrid), [1, 3]);
        let replicated = Mesh::data_parallel_groups(3, 1);
        let one = table(&[(4, &[9]), (4, &[9]), (5, &[6])]);
        assert_eq!(differing(&one, &replicated), [2]);
    }
}
