package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"mailbridge/internal/app"
)

func newCheck(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Check the configuration, its secrets and its keys; start nothing",
		Args:  usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			f, err := e.load()
			if err != nil {
				return err
			}
			if err := app.Check(cmd.Context(), f); err != nil {
				return fmt.Errorf("%s:\n%w", f.Path, err)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: good: %d listeners, %d profiles, %d accounts\n", f.Path, len(f.SMTP.Listen), len(f.Profiles), len(f.Accounts))
			return err
		},
	}
}
