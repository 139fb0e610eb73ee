package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"mailbridge/internal/app"
)

func newServe(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "serve",
		Short: "Run the service until it is told to stop",
		Args:  usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			f, err := e.load()
			if err != nil {
				return err
			}
			return app.Serve(cmd.Context(), f, app.Options{Version: version, LogTo: cmd.ErrOrStderr()})
		},
	}
}

func newDemo() *cobra.Command {
	var o app.DemoOptions
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Run the bridge with simulated clouds and mailboxes; no account needed",
		Args:  usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Out, o.LogTo, o.Version = cmd.OutOrStdout(), cmd.ErrOrStderr(), version
			return app.Demo(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVar(&o.JSON, "json", false, "print the settings as one JSON object on the first line")
	cmd.Flags().BoolVar(&o.Ephemeral, "ephemeral", false, "use free ports instead of fixed ones")
	cmd.Flags().BoolVarP(&o.Verbose, "verbose", "v", false, "log what happens")
	return cmd
}

func newCloudsim() *cobra.Command {
	var o app.CloudsimOptions
	cmd := &cobra.Command{
		Use:   "cloudsim",
		Short: "Run the simulated clouds alone, for tests of your own",
		Args:  usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Out, o.LogTo = cmd.OutOrStdout(), cmd.ErrOrStderr()
			return app.Cloudsim(cmd.Context(), o)
		},
	}
	cmd.Flags().StringVar(&o.Dir, "dir", "", "folder that keeps the certificate authority over restarts (default: a new one each time)")
	cmd.Flags().BoolVar(&o.Ephemeral, "ephemeral", false, "use free ports instead of fixed ones")
	return cmd
}

func newDoctor(e *env) *cobra.Command {
	var o app.DoctorOptions
	cmd := &cobra.Command{
		Use:   "doctor [ACCOUNT]...",
		Short: "Check everything from DNS to a sent message, and say what to do",
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := e.load()
			if err != nil {
				return err
			}
			for _, a := range args {
				if _, ok := f.Accounts[a]; !ok {
					return usageError{fmt.Errorf("there is no account %q in %s", a, f.Path)}
				}
			}
			o.Accounts, o.Out, o.Version = args, cmd.OutOrStdout(), version
			return app.Doctor(cmd.Context(), f, o)
		},
	}
	cmd.Flags().BoolVar(&o.Send, "send", false, "send a message from each mailbox to itself")
	cmd.Flags().BoolVar(&o.JSON, "json", false, "print one JSON object")
	return cmd
}
