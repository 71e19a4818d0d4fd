//! Offers of instances to other projects: as a table, whole, and as they are
//! told to the giver.

use drover_model::{
    api::conductor::{Offer, OfferMade},
    ids::ProjectId,
};

use super::{
    clean,
    describe::{facts, or_nothing, who},
    table::{grid, nothing},
    units::moment,
};

/// Who may accept an offer that names nobody.
pub const ANYBODY: &str = "whoever has the key";

/// Offers.
pub fn table(offers: &[Offer]) -> String {
    if offers.is_empty() {
        return "no offers".to_owned();
    }
    let header = [
        "OFFER", "INSTANCE", "FROM", "TO", "STATE", "OFFERED", "EXPIRES", "BY",
    ];
    grid(&header, offers.iter().map(row))
}

fn row(o: &Offer) -> Vec<String> {
    let to = o.to_project.as_ref();
    vec![
        o.id.to_string(),
        o.instance_name.clone(),
        o.from_project.clone(),
        to.map_or_else(nothing, ToString::to_string),
        o.state.as_str().to_owned(),
        moment(o.created_at_ms),
        moment(o.expires_at_ms),
        o.offered_by.user_id.clone().unwrap_or_else(nothing),
    ]
}

fn receiver(o: &Offer) -> String {
    let to = o.to_project.as_ref();
    to.map_or_else(|| ANYBODY.to_owned(), ToString::to_string)
}

fn instance(o: &Offer) -> String {
    format!("{} ({})", o.instance_name, o.instance_uuid)
}

/// An offer.
pub fn whole(o: &Offer) -> String {
    let offered = format!("{} by {}", moment(o.created_at_ms), who(&o.offered_by));
    facts(vec![
        ("offer", o.id.to_string()),
        ("instance", instance(o)),
        ("from", o.from_project.clone()),
        ("to", receiver(o)),
        ("state", o.state.as_str().to_owned()),
        ("offered", offered),
        ("expires", moment(o.expires_at_ms)),
        ("wrong keys", o.wrong_keys.to_string()),
        ("migration", or_nothing(o.migration)),
    ])
}

/// An offer in a few words.
pub fn line(o: &Offer) -> String {
    let (name, state) = (clean(&o.instance_name), o.state.as_str());
    format!("offer {} of {name} is {state}", o.id)
}

/// An offer that was just made, with its key.
pub fn made(made: &OfferMade) -> String {
    let o = &made.offer;
    let told = facts(vec![
        ("offer", o.id.to_string()),
        ("instance", instance(o)),
        ("from", o.from_project.clone()),
        ("to", receiver(o)),
        ("until", moment(o.expires_at_ms)),
        ("key", made.key.clone()),
    ]);
    let to = o.to_project.as_ref().map_or("P", ProjectId::as_str);
    format!(
        "{told}\n\nThe key is shown this once and kept nowhere. With it the receiver takes the \
         instance:\n  `drover transfer accept {} --project {to} --live` (or --cold)",
        o.id
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    #[test]
    fn offers_look_so() {
        let mut open = samples::offer();
        open.to_project = None;
        let expected = "\
OFFER                                 INSTANCE  FROM     TO    STATE     OFFERED               EXPIRES               BY
01997777-0000-7000-8000-00000000feed  demo-1    default  blue  accepted  2026-11-23 18:46:51Z  2026-11-24 18:46:51Z  ann
01997777-0000-7000-8000-00000000feed  demo-1    default  -     open      2026-11-23 18:46:51Z  2026-11-24 18:46:51Z  ann";
        let mut accepted = samples::offer();
        accepted.state = drover_model::api::conductor::OfferState::Accepted;
        let table = table(&[accepted, open]);
        assert_eq!(table, expected, "\n{table}");
    }

    #[test]
    fn a_whole_offer_looks_so() {
        let mut offer = samples::offer();
        offer.wrong_keys = 2;
        offer.migration = Some(samples::MIGRATION.parse().unwrap());
        let expected = "\
offer       01997777-0000-7000-8000-00000000feed
instance    demo-1 (11111111-2222-4333-8444-555555555555)
from        default
to          blue
state       open
offered     2026-11-23 18:46:51Z by user ann
expires     2026-11-24 18:46:51Z
wrong keys  2
migration   01997777-0000-7000-8000-00000000abcd";
        assert_eq!(whole(&offer), expected, "\n{}", whole(&offer));
        offer.to_project = None;
        assert!(whole(&offer).contains("\nto          whoever has the key\n"));
    }
}
