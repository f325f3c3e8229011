//! `blockctl io holds`: what keeps requests of clients waiting.

use crate::output::table;
use blockd::admin::HoldsInfo;

pub(crate) fn holds_text(holds: &HoldsInfo) -> String {
    let rows = holds.holds.iter().map(|(volume, hold)| {
        vec![
            volume.clone(),
            hold.server.to_string(),
            format!("{:016x} of server {}", hold.ticket.0, hold.coordinator),
            format!("{} ms", hold.age_ms),
            hold.left_ms
                .map_or_else(|| "-".to_owned(), |ms| format!("{ms} ms")),
            hold.waiting.to_string(),
            hold.parked.to_string(),
            hold.reason.clone(),
        ]
    });
    let header = [
        "VOLUME", "SERVER", "OWNER", "AGE", "LEFT", "WAITING", "PARKED", "REASON",
    ];
    let mut text = match holds.holds.is_empty() {
        true => "nothing waits".to_owned(),
        false => table(&header, &[1, 3, 4, 5, 6], rows),
    };
    for node in &holds.unreachable {
        text.push_str(&format!("\nserver {node} did not answer"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockd::admin::{HoldInfo, json};
    use blockd::id::{NodeNo, TicketId, VolumeId};

    /// a hold has an owner, a reason, an age and a deadline; silence is no proof of none.
    #[test]
    fn a_hold_says_whose_it_is_and_when_it_ends() {
        let hold = HoldInfo {
            volume: VolumeId(3),
            server: NodeNo(2),
            ticket: TicketId(0xab),
            coordinator: NodeNo(1),
            reason: "snapshot 4 by hold: changes wait".to_owned(),
            age_ms: 7,
            left_ms: Some(493),
            waiting: 5,
            parked: 0,
        };
        let holds = HoldsInfo {
            holds: vec![("demo".to_owned(), hold)],
            unreachable: vec![NodeNo(3)],
        };
        let json = json::holds(&holds);
        assert_eq!(json["holds"][0]["ticket"], "00000000000000ab");
        assert_eq!(json["holds"][0]["left_ms"], 493);
        assert_eq!(json["unreachable"][0], 3);
        let text = holds_text(&holds);
        assert!(
            text.contains("of server 1") && text.contains("493 ms"),
            "{text}"
        );
        assert!(text.contains("server 3 did not answer"), "{text}");
        assert_eq!(holds_text(&HoldsInfo::default()), "nothing waits");
    }
}
