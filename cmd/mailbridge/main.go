// Command mailbridge is an SMTP server for old clients that sends through Microsoft 365 and Gmail. This
// package holds flags, signals and exit codes; everything else is internal/app.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"mailbridge/internal/app"
	"mailbridge/internal/config"
)

// version is set by the linker: -ldflags "-X main.version=1.2.3".
var version = "dev"

// Exit codes.
const (
	exitFailed = 1 // the command failed
	exitUsage  = 2 // the command line is wrong
	exitStuck  = 3 // something is stuck or unhealthy
)

func main() {
	// A first signal stops in order; a second one, no longer caught, ends the process at once.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

func run(ctx context.Context, args []string, in io.Reader, out, errs io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errs)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	var usage usageError
	switch {
	case errors.Is(err, app.ErrStuck):
		// The command has printed what is stuck.
		return exitStuck
	case errors.As(err, &usage):
		fmt.Fprintf(errs, "mailbridge: %v\n", err)
		return exitUsage
	}
	fmt.Fprintf(errs, "mailbridge: %v\n", err)
	return exitFailed
}

// usageError is a wrong command line.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

// usage makes the errors of an argument check usage errors.
func usage(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usageError{fmt.Errorf("%w\nusage: %s", err, cmd.UseLine())}
		}
		return nil
	}
}

// env is what every command shares.
type env struct{ config string }

// load reads the configuration that the command line names.
func (e *env) load() (*config.File, error) {
	path := e.config
	if path == "" {
		var err error
		if path, err = config.Find(); err != nil {
			return nil, err
		}
	}
	return config.Load(path)
}

func newRoot() *cobra.Command {
	e := &env{}
	root := &cobra.Command{
		Use:           "mailbridge",
		Short:         "SMTP for old clients, through Microsoft 365 and Gmail",
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usageError{fmt.Errorf("name a command\n\n%s", cmd.UsageString())}
		},
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.PersistentFlags().StringVarP(&e.config, "config", "c", "", "configuration file (default: mailbridge.toml here, then /etc/mailbridge/mailbridge.toml)")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w\nusage: %s", err, cmd.UseLine())}
	})
	root.AddCommand(newServe(e), newCheck(e), newDemo(), newCloudsim(), newDoctor(e), newPasswd(e), newSecret(e), newQueue(e))
	return root
}
