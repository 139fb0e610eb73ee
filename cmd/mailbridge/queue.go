package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"mailbridge/internal/app"
	"mailbridge/internal/outbox"
)

func newQueue(e *env) *cobra.Command {
	queue := &cobra.Command{Use: "queue", Short: "Mail that waits, and why", Args: usage(cobra.NoArgs), RunE: group}
	queue.AddCommand(newQueueList(e), newQueueShow(e),
		newQueueChange(e, "retry", "Try messages again now", (*outbox.Queue).Retry),
		newQueueChange(e, "hold", "Keep waiting messages from being sent", (*outbox.Queue).Hold),
		newQueueChange(e, "release", "Let held messages go", (*outbox.Queue).Release),
		newQueueChange(e, "delete", "Forget messages for good, without a report to the sender", (*outbox.Queue).Delete))
	return queue
}

// with opens the queue for f.
func (e *env) with(ctx context.Context, f func(q *outbox.Queue, dir string) error) error {
	cfg, err := e.load()
	if err != nil {
		return err
	}
	q, err := app.OpenQueue(ctx, cfg)
	if err != nil {
		return err
	}
	return errors.Join(f(q, cfg.Absolute()), q.Close())
}

// filter is the flags that choose messages.
type filter struct {
	account, state string
	older          time.Duration
	limit          int
}

func (f *filter) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.account, "account", "", "only this account's")
	cmd.Flags().StringVar(&f.state, "state", "", "only those in this state: queued, unsure, held, bouncing, dead, sent")
	cmd.Flags().DurationVar(&f.older, "older", 0, "only those older than this, such as 24h")
	cmd.Flags().IntVar(&f.limit, "limit", 1000, "at most so many")
}

func (f *filter) filter() outbox.Filter {
	return outbox.Filter{Account: f.account, State: outbox.State(f.state), Older: f.older, Limit: f.limit}
}

func newQueueList(e *env) *cobra.Command {
	var f filter
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List mail that waits; exit code 3 when something needs a person",
		Args:  usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return e.with(cmd.Context(), func(q *outbox.Queue, _ string) error {
				list, err := q.List(cmd.Context(), f.filter())
				if err != nil {
					return err
				}
				parks, err := q.Parks(cmd.Context())
				if err != nil {
					return err
				}
				stuck := false
				for i := range list {
					stuck = stuck || list[i].Stuck()
				}
				for _, p := range parks {
					stuck = stuck || p.Class == "auth"
				}
				if asJSON {
					if parks == nil {
						parks = []outbox.Park{}
					}
					err = json.NewEncoder(cmd.OutOrStdout()).Encode(map[string]any{"stuck": stuck, "messages": list, "parked_accounts": parks})
				} else {
					err = printQueue(cmd, list, parks)
				}
				if err == nil && stuck {
					err = app.ErrStuck
				}
				return err
			})
		},
	}
	f.flags(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return cmd
}

func printQueue(cmd *cobra.Command, list []outbox.Entry, parks []outbox.Park) error {
	for _, p := range parks {
		fmt.Fprintf(cmd.OutOrStdout(), "account %s waits (%s) since %s, next try %s: %s\n", p.Account, p.Class, day(p.Since), day(p.Until), p.Reason)
	}
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tACCOUNT\tSTATE\tAGE\tTRIES\tNEXT\tSIZE\tTO\tREASON")
	for _, m := range list {
		next := "-"
		if m.NextAt != nil {
			next = day(*m.NextAt)
		}
		var to []string
		for _, r := range m.Recipients {
			if r.State != "sent" {
				to = append(to, r.Address)
			}
		}
		if len(to) > 3 {
			to = append(to[:2], fmt.Sprintf("and %d more", len(to)-2))
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\t%d\t%s\t%s %s\n", m.ID, m.Account, m.State, time.Since(m.Created).Round(time.Second), m.Attempts, next, m.Size, strings.Join(to, ", "), m.Code, m.Reason)
	}
	return w.Flush()
}

func newQueueShow(e *env) *cobra.Command {
	var raw bool
	cmd := &cobra.Command{
		Use:   "show ID",
		Short: "Show all that is known of a message",
		Args:  usage(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.with(cmd.Context(), func(q *outbox.Queue, _ string) error {
				if raw {
					return q.Body(cmd.Context(), outbox.ID(args[0]), cmd.OutOrStdout())
				}
				m, err := q.Show(cmd.Context(), outbox.ID(args[0]))
				if err != nil {
					return err
				}
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				enc.SetEscapeHTML(false)
				return enc.Encode(m)
			})
		},
	}
	cmd.Flags().BoolVar(&raw, "raw", false, "print the message itself")
	return cmd
}

func newQueueChange(e *env, verb, short string, change func(*outbox.Queue, context.Context, outbox.ID) error) *cobra.Command {
	var f filter
	cmd := &cobra.Command{
		Use:   verb + " [ID]...",
		Short: short,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 && f.account == "" && f.state == "" && f.older == 0 {
				return usageError{errors.New("name messages by id, or choose them with --account, --state or --older")}
			}
			return e.with(cmd.Context(), func(q *outbox.Queue, dir string) error {
				ids := make([]outbox.ID, len(args))
				for i, a := range args {
					ids[i] = outbox.ID(a)
				}
				if len(ids) == 0 {
					list, err := q.List(cmd.Context(), f.filter())
					if err != nil {
						return err
					}
					for _, m := range list {
						ids = append(ids, m.ID)
					}
				}
				var errs []error
				for _, id := range ids {
					if err := change(q, cmd.Context(), id); err != nil {
						errs = append(errs, err)
						continue
					}
					fmt.Fprintln(cmd.OutOrStdout(), id)
				}
				// A running service would see the change within seconds; telling it makes it now.
				path := "/kick"
				if verb == "retry" && f.account != "" {
					path = "/resume?account=" + f.account
				}
				if _, err := app.Tell(cmd.Context(), dir, path); err != nil {
					errs = append(errs, err)
				}
				return errors.Join(errs...)
			})
		},
	}
	f.flags(cmd)
	return cmd
}
