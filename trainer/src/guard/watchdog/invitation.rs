//! What a rank must know to reach rank 0, and how rank 0 finds out where it can be reached.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use if_addrs::{IfOperStatus, Interface};

use super::error::WatchdogError;
use super::handshake::{self, Secret};

/// What opens the bytes of an invitation.
const MAGIC: [u8; 4] = *b"oxi1";

/// Bytes of an address: kind, address, port.
const ADDRESS_BYTES: usize = 1 + 16 + 2;

/// Where rank 0 listens, and the secret of the run. It travels over MPI and into no log.
#[derive(Clone, PartialEq, Eq)]
pub struct Invitation {
    pub(super) addresses: Vec<SocketAddr>,
    pub(super) secret: Secret,
}

impl std::fmt::Debug for Invitation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Invitation")
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

impl Invitation {
    /// Bytes of [`Invitation::to_bytes`]: always as many, so that it can be broadcast by ranks that
    /// do not know it yet.
    pub const BYTES: usize = 256;

    /// The most addresses that fit.
    pub(super) const MAX_ADDRESSES: usize =
        (Self::BYTES - MAGIC.len() - handshake::BYTES - 1) / ADDRESS_BYTES;

    /// To be broadcast to all ranks.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.secret.0);
        let addresses = self.addresses.iter().take(Self::MAX_ADDRESSES);
        bytes.push(addresses.len() as u8);
        for address in addresses {
            let (kind, ip) = match address.ip() {
                IpAddr::V4(ip) => (4, ip.to_ipv6_mapped()),
                IpAddr::V6(ip) => (6, ip),
            };
            bytes.push(kind);
            bytes.extend(ip.octets());
            bytes.extend(address.port().to_le_bytes());
        }
        bytes.resize(Self::BYTES, 0);
        let mut fixed = [0; Self::BYTES];
        fixed.copy_from_slice(&bytes);
        fixed
    }

    /// Reads what [`Invitation::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`WatchdogError::Invitation`] when it did not.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, WatchdogError> {
        let invalid = |found: String| WatchdogError::Invitation { found };
        if bytes.len() != Self::BYTES {
            return Err(invalid(format!(
                "{} bytes in place of {}",
                bytes.len(),
                Self::BYTES
            )));
        }
        let (magic, rest) = bytes.split_at(MAGIC.len());
        if magic != MAGIC {
            return Err(invalid("bytes that do not begin like one".to_owned()));
        }
        let (secret, rest) = rest.split_at(handshake::BYTES);
        let mut key = [0; handshake::BYTES];
        key.copy_from_slice(secret);
        let (count, rest) = rest.split_at(1);
        let count = usize::from(count[0]);
        if count == 0 || count > Self::MAX_ADDRESSES {
            return Err(invalid(format!("{count} addresses")));
        }
        let addresses = rest.chunks_exact(ADDRESS_BYTES).take(count);
        let addresses = addresses.map(|bytes| {
            let mut ip = [0; 16];
            ip.copy_from_slice(&bytes[1..17]);
            let ip = Ipv6Addr::from(ip);
            let ip = match (bytes[0], ip.to_ipv4_mapped()) {
                (4, Some(ip)) => IpAddr::V4(ip),
                (6, _) => IpAddr::V6(ip),
                (kind, _) => return Err(invalid(format!("an address of kind {kind}"))),
            };
            let port = u16::from_le_bytes([bytes[17], bytes[18]]);
            Ok(SocketAddr::new(ip, port))
        });
        Ok(Self {
            addresses: addresses.collect::<Result<_, _>>()?,
            secret: Secret(key),
        })
    }
}

/// Where rank 0 is to listen: on this host only, or on each interface that another host may reach.
pub(super) fn listening(
    one_host: bool,
    interface: Option<&str>,
) -> Result<Vec<IpAddr>, WatchdogError> {
    if one_host {
        return Ok(vec![IpAddr::V4(Ipv4Addr::LOCALHOST)]);
    }
    let all = if_addrs::get_if_addrs().map_err(|source| WatchdogError::Listen {
        address: "the interfaces of this host".to_owned(),
        source,
    })?;
    choose(&all, interface)
}

/// The addresses to listen on among those of `all`, IPv4 first.
fn choose(all: &[Interface], wanted: Option<&str>) -> Result<Vec<IpAddr>, WatchdogError> {
    let reachable = |interface: &&Interface| {
        let link_local = match interface.ip() {
            IpAddr::V4(ip) => ip.is_link_local(),
            // Needs the number of the interface, which differs from host to host.
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        };
        // Some virtual interfaces do not say whether they are up.
        let up = matches!(
            interface.oper_status,
            IfOperStatus::Up | IfOperStatus::Unknown
        );
        !link_local && up && (wanted.is_some() || !interface.is_loopback())
    };
    let asked_for = |interface: &&Interface| {
        wanted.is_none_or(|wanted| interface.name == wanted || wanted.parse() == Ok(interface.ip()))
    };
    let mut addresses: Vec<IpAddr> = all
        .iter()
        .filter(reachable)
        .filter(asked_for)
        .map(Interface::ip)
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses.truncate(Invitation::MAX_ADDRESSES);
    if addresses.is_empty() {
        let found: Vec<String> = all
            .iter()
            .map(|interface| format!("{} ({})", interface.name, interface.ip()))
            .collect();
        let wanted = match wanted {
            Some(wanted) => format!("an interface or an address `{wanted}` that is up"),
            None => "an interface that other hosts reach".to_owned(),
        };
        return Err(WatchdogError::Interface {
            wanted,
            found: found.join(", "),
        });
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use if_addrs::{IfAddr, Ifv4Addr, Ifv6Addr};
    use proptest::prelude::*;

    use super::*;

    fn invitation(addresses: &[&str]) -> Invitation {
        Invitation {
            addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
            secret: Secret(handshake::random().unwrap()),
        }
    }

    #[test]
    fn an_invitation_survives_its_bytes() {
        let sent = invitation(&["127.0.0.1:80", "10.0.0.7:65535", "[2001:db8::1]:4000"]);
        assert_eq!(Invitation::from_bytes(&sent.to_bytes()).unwrap(), sent);
        let many = vec!["10.0.0.7:1"; Invitation::MAX_ADDRESSES];
        let many = invitation(&many);
        assert_eq!(Invitation::from_bytes(&many.to_bytes()).unwrap(), many);
    }

    #[test]
    fn the_secret_is_not_shown() {
        let mut invitation = invitation(&["127.0.0.1:80"]);
        invitation.secret = Secret([77; handshake::BYTES]);
        let shown = format!("{invitation:?}");
        assert!(
            shown.contains("127.0.0.1:80") && !shown.contains("77"),
            "{shown}"
        );
    }

    proptest! {
        #[test]
        fn garbage_is_no_invitation(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(Invitation::from_bytes(&bytes).is_err());
        }

        #[test]
        fn damage_never_panics(at in 0..Invitation::BYTES, value: u8) {
            let mut bytes = invitation(&["127.0.0.1:80"]).to_bytes();
            bytes[at] = value;
            let _ = Invitation::from_bytes(&bytes);
        }
    }

    fn interface(name: &str, ip: &str, up: bool) -> Interface {
        let addr = match ip.parse().unwrap() {
            IpAddr::V4(ip) => IfAddr::V4(Ifv4Addr {
                ip,
                netmask: Ipv4Addr::UNSPECIFIED,
                prefixlen: 0,
                broadcast: None,
            }),
            IpAddr::V6(ip) => IfAddr::V6(Ifv6Addr {
                ip,
                netmask: Ipv6Addr::UNSPECIFIED,
                prefixlen: 0,
                broadcast: None,
            }),
        };
        let oper_status = if up {
            IfOperStatus::Up
        } else {
            IfOperStatus::Down
        };
        Interface {
            name: name.to_owned(),
            addr,
            index: None,
            oper_status,
        }
    }

    #[test]
    fn only_what_other_hosts_reach_is_listened_on() {
        let all = [
            interface("lo", "127.0.0.1", true),
            interface("eth0", "10.0.0.7", true),
            interface("eth0", "fe80::1", true),
            interface("ib0", "2001:db8::1", true),
            interface("eth1", "10.1.0.7", false),
        ];
        let ips = |texts: &[&str]| -> Vec<IpAddr> {
            texts.iter().map(|text| text.parse().unwrap()).collect()
        };
        assert_eq!(
            choose(&all, None).unwrap(),
            ips(&["10.0.0.7", "2001:db8::1"])
        );
        assert_eq!(choose(&all, Some("ib0")).unwrap(), ips(&["2001:db8::1"]));
        assert_eq!(choose(&all, Some("10.0.0.7")).unwrap(), ips(&["10.0.0.7"]));
        let error = choose(&all, Some("eth1")).unwrap_err().to_string();
        assert!(
            error.contains("`eth1`") && error.contains("ib0 (2001:db8::1)"),
            "{error}"
        );
        assert!(choose(&all[..1], None).is_err());
        assert_eq!(listening(true, Some("ib0")).unwrap(), ips(&["127.0.0.1"]));
    }
}
