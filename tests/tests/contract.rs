//! Every point of the hypervisor drivers' contract, on the fake and on libvirt.
//!
//! `fake::` always runs, in virtual time. `libvirt::` runs on a devstack whose
//! directory is in `DROVER_DEVSTACK`, says `SKIPPED` without one, and fails
//! without one if `DROVER_REQUIRE_REAL=1`.

macro_rules! contract {
    ($($module:ident { $($point:ident,)* })*) => {
        mod fake {
            $($(
                #[test]
                fn $point() {
                    use drover_tests::contract::{fake, $module};
                    fake::run($module::$point);
                }
            )*)*
        }

        mod libvirt {
            $($(
                #[test]
                fn $point() {
                    use drover_tests::contract::{real, $module};
                    real::run($module::$point);
                }
            )*)*
        }
    };
}

contract! {
    looking {
        inventory_is_sane,
        views_agree_on_a_running_guest,
        views_agree_on_a_paused_guest,
        views_agree_on_a_shut_off_guest,
        an_unknown_guest_is_absent,
        without_a_job_there_is_nothing_to_steer,
        resume_lets_a_paused_guest_run,
        resume_starts_nothing,
        undefine_takes_what_is_off_and_nothing_else,
        discarding_takes_nothing_else,
        a_fit_destination_says_so,
        an_unfit_destination_says_where,
        taken_names_are_told,
        only_an_active_guest_migrates,
        an_unreachable_destination_harms_nobody,
        a_probe_port_is_reached,
    }
    moving {
        migrate_moves_a_guest,
        migrate_moves_a_guest_on_a_shared_disk,
        migrate_copies_a_local_disk,
        a_paused_guest_moves_paused,
        job_tells_how_far_it_is,
        the_destination_waits_while_the_source_runs,
        the_destination_tells_the_downtime,
        a_move_is_announced,
        a_second_migration_is_refused,
        a_longer_downtime_lets_a_busy_guest_go,
        a_migration_outlives_its_caller,
    }
    turning {
        an_abort_leaves_everything_as_it_was,
        after_an_abort_it_can_move,
        post_copy_moves_the_guest_at_once,
        half_a_guest_stands_still_until_it_is_discarded,
        post_copy_must_have_been_allowed,
        a_pause_ends_a_migration_that_would_not_end,
        after_pause_and_abort_it_runs_on,
        a_discarded_destination_leaves_the_guest,
    }
    cold {
        shut_down_is_obeyed,
        shut_down_of_what_does_not_run_is_wrong_state,
        stop_is_at_once_and_repeatable,
        start_is_repeatable,
        only_what_is_in_shutdown_goes_off,
        the_lasting_guest_is_the_guest,
        a_guest_that_is_defined_anew_is_told_apart,
        a_definition_goes_away_and_comes_back,
        define_with_a_flavor_changes_the_size,
        define_over_an_active_guest_is_refused,
        withdraw_takes_what_is_off_and_nothing_else,
        a_definition_starts_on_the_other_node,
        a_disk_is_frozen_and_thawed,
        an_overlay_is_merged_once_its_guest_is_off,
        only_the_disk_that_was_meant_is_frozen,
    }
    carrying {
        a_file_is_reserved_once,
        a_file_is_renamed_over_nothing_and_once,
        a_file_in_use_is_not_renamed,
        facts_say_what_is_there,
        a_file_is_flushed,
        files_are_sent_and_verified,
        what_is_expected_is_expected_once,
        sending_with_a_wrong_token_ends,
        sending_to_nobody_stalls,
        sending_what_is_not_there_fails,
        cancelled_sending_ends_soon_and_resumes,
        a_present_file_that_differs_is_told,
        nothing_is_written_once_receiving_has_stopped,
        a_source_that_changes_is_told,
    }
    files {
        a_disk_is_made_and_removed,
        no_disk_is_made_over_a_file,
        no_disk_is_made_in_what_somebody_wrote,
        no_disk_is_made_in_what_a_guest_uses,
        no_disk_is_made_without_a_directory,
        no_disk_in_use_is_removed,
        a_mark_proves_a_shared_directory,
        marks_belong_to_their_migration,
        a_mark_in_a_local_directory_proves_nothing,
        contents_are_told_apart,
        a_guest_is_bound_to_what_is_there,
    }
    hands {
        networks_are_told_apart,
        locations_are_told,
        other_users_of_a_file_are_named,
        a_running_guest_is_handed_over_and_back,
        handing_over_lasts,
        handing_back_after_nothing_is_no_error,
        a_failed_handing_over_is_taken_back,
        only_an_active_guest_is_handed_over,
        a_disk_moves_under_its_guest,
        a_disk_moves_back,
        an_abandoned_copy_changes_nothing,
        no_copy_is_made_over_a_file,
        only_a_whole_copy_is_gone_on_with,
        while_a_disk_is_copied_its_guest_stays,
        a_placed_disk_starts_for_the_receiver,
        a_guest_gets_another_name,
        a_placed_disk_goes_back,
        nothing_is_placed_from_nowhere,
    }
    rebuild {
        usage_grows_while_a_guest_is_active,
        wishes_are_told,
        a_digest_changes_with_the_definition_alone,
        a_kept_definition_starts_elsewhere,
        a_guest_is_rebuilt_once,
        a_shared_disk_is_the_same_elsewhere,
        a_local_disk_is_not_the_same_elsewhere,
        a_dirty_rate_is_measured,
        autostart_is_taken_over,
    }
    away {
        away_is_an_error_and_never_an_empty_answer,
        back_again_everything_works,
        lost_in_the_middle_is_not_failed,
    }
}
