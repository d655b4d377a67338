//! Who trains in the next attempt: the ranks of the last one, or fewer on the machines that are
//! left.

use anyhow::Result;

use crate::ranks::{Answer, Hosts};

/// Whether a config can run on a number of ranks, given where they run.
pub(super) type Accepts<'a> = &'a dyn Fn(usize, &Hosts) -> bool;

/// Where the next attempt runs.
pub(super) enum Crew {
    /// On these machines, with this many ranks.
    Ready {
        /// The machines.
        hosts: Hosts,
        /// The ranks.
        ranks: usize,
        /// What differs from the command line, in words.
        note: Option<String>,
    },
    /// Nowhere: too much is missing. In words, with the machines that are gone.
    Short(String),
}

/// Chooses among the machines of `hosts`, which gave these answers: `ranks` ranks if that can be,
/// else as many as possible but not fewer than `min`.
///
/// # Errors
/// The host file of the machines left cannot be written.
pub(super) fn choose(
    hosts: &Hosts,
    answers: &[Answer],
    (ranks, min): (usize, Option<usize>),
    accepts: Accepts<'_>,
) -> Result<Crew> {
    let dead: Vec<&Answer> = answers.iter().filter(|a| a.dead.is_some()).collect();
    if dead.is_empty() {
        return Ok(Crew::Ready {
            hosts: hosts.clone(),
            ranks,
            note: None,
        });
    }
    let names: Vec<String> = dead.iter().map(|answer| answer.host.clone()).collect();
    let left = hosts.without(&names)?;
    let slots = left.as_ref().map_or(0, Hosts::slots);
    let least = min.unwrap_or(ranks);
    if let Some(left) = left
        && let Some(most) = (least..=ranks.min(slots))
            .rev()
            .find(|&n| accepts(n, &left))
    {
        let without = format!("without {}", names.join(", "));
        return Ok(Crew::Ready {
            hosts: left,
            ranks: most,
            note: Some(if most < ranks {
                format!("on {most} of {ranks} ranks, {without}")
            } else {
                without
            }),
        });
    }
    let why = |answer: &&Answer| {
        let dead = answer.dead.as_deref().unwrap_or_default();
        format!("{} ({dead})", answer.host)
    };
    let dead: Vec<String> = dead.iter().map(why).collect();
    let needed = match min {
        None => format!(
            "{ranks} ranks need as many (with --min-ranks M the run would go on with M or more)"
        ),
        Some(min) if slots < min => format!("--min-ranks {min} needs as many"),
        Some(min) => format!(
            "none of the numbers of ranks from --min-ranks {min} on can run this config there \
             (`oxitron plan CONFIG --ranks {min}` says why)"
        ),
    };
    Ok(Crew::Short(format!(
        "{} of {} machines cannot be used: {}; the others have {slots} slots, and {needed}",
        dead.len(),
        answers.len(),
        dead.join(", ")
    )))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;

    fn hosts(text: &str) -> Hosts {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hosts");
        std::fs::write(&path, text).unwrap();
        Hosts::read(&path).unwrap()
    }

    fn chosen(dead: &[&str], min: Option<usize>, accepts: Accepts<'_>) -> Crew {
        let hosts = hosts("a slots=2\nb slots=2\nc slots=2\nspare slots=1\n");
        let answers: Vec<Answer> = hosts
            .names()
            .into_iter()
            .map(|host| Answer {
                dead: dead
                    .contains(&&*host)
                    .then(|| "no answer in 20 s".to_owned()),
                host,
            })
            .collect();
        choose(&hosts, &answers, (6, min), accepts).unwrap()
    }

    fn ready(crew: Crew) -> (usize, Vec<String>, Option<String>) {
        match crew {
            Crew::Ready { hosts, ranks, note } => (ranks, hosts.names(), note),
            Crew::Short(words) => panic!("{words}"),
        }
    }

    fn short(crew: Crew) -> String {
        match crew {
            Crew::Short(words) => words,
            Crew::Ready { ranks, .. } => panic!("{ranks} ranks"),
        }
    }

    #[test]
    fn all_answer_or_a_spare_machine_stands_in() {
        let (ranks, names, note) = ready(chosen(&[], None, &|_, _| false));
        assert_eq!((ranks, names.len(), note), (6, 4, None));
        let (ranks, names, note) = ready(chosen(&["spare"], None, &|_, _| true));
        assert_eq!((ranks, names.len()), (6, 3));
        assert_eq!(note.unwrap(), "without spare");
    }

    #[test]
    fn as_many_ranks_as_slots_and_config_allow() {
        let (ranks, names, note) = ready(chosen(&["b"], Some(2), &|_, _| true));
        assert_eq!(
            (ranks, names),
            (5, vec!["a".into(), "c".into(), "spare".into()])
        );
        assert_eq!(note.unwrap(), "on 5 of 6 ranks, without b");
        let even = |ranks: usize, _: &Hosts| ranks.is_multiple_of(2);
        assert_eq!(ready(chosen(&["b"], Some(2), &even)).0, 4);
    }

    #[test]
    fn too_little_is_said_with_machines_slots_and_need() {
        let words = short(chosen(&["a", "b"], Some(4), &|_, _| true));
        let expected = "2 of 4 machines cannot be used: a (no answer in 20 s), b (no answer in \
                        20 s); the others have 3 slots, and --min-ranks 4 needs as many";
        assert_eq!(words, expected);
        let words = short(chosen(&["a"], None, &|_, _| true));
        assert!(
            words.contains("5 slots, and 6 ranks need as many"),
            "{words}"
        );
        let words = short(chosen(&["a"], Some(3), &|_, _| false));
        assert!(words.contains("from --min-ranks 3 on can run"), "{words}");
        let words = short(chosen(&["a", "b", "c", "spare"], Some(1), &|_, _| true));
        assert!(words.contains("have 0 slots"), "{words}");
    }
}
