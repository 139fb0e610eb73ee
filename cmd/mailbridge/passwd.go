package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"mailbridge/internal/app"
	"mailbridge/internal/secret"
)

func newPasswd(e *env) *cobra.Command {
	passwd := &cobra.Command{
		Use:   "passwd",
		Short: "Bridge passwords: what clients log in with",
		Args:  usage(cobra.NoArgs),
		RunE:  group,
	}
	var label string
	var stdin, short bool
	add := &cobra.Command{
		Use:   "add ACCOUNT",
		Short: "Make a password for an account and print it, once",
		Args:  usage(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := e.load()
			if err != nil {
				return err
			}
			n := app.NewPassword{Account: args[0], Label: label, Short: short}
			if stdin {
				if n.Given, err = readSecret(cmd, "password: "); err != nil {
					return err
				}
			}
			made, err := app.AddPassword(cmd.Context(), f, n)
			if err != nil {
				return err
			}
			if stdin {
				_, err = fmt.Fprintln(cmd.ErrOrStderr(), "stored")
				return err
			}
			// The password alone on standard output, so that a script can take it.
			fmt.Fprintf(cmd.ErrOrStderr(), "user %s (or %s), password, shown this once:\n", args[0], f.Accounts[args[0]].Mailbox)
			_, err = fmt.Fprintln(cmd.OutOrStdout(), made.Reveal())
			return err
		},
	}
	add.Flags().StringVarP(&label, "label", "l", "", "what it is for, such as the device's name")
	add.Flags().BoolVar(&stdin, "stdin", false, "read the password instead of making one")
	add.Flags().BoolVar(&short, "short", false, "16 characters, for panels that cut long ones")
	list := &cobra.Command{
		Use:   "list [ACCOUNT]",
		Short: "List passwords: labels and dates, never the passwords",
		Args:  usage(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := e.load()
			if err != nil {
				return err
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "ACCOUNT\tID\tLABEL\tCREATED\tLAST USED")
			all, err := app.ListPasswords(cmd.Context(), f, strings.Join(args, ""))
			if err != nil {
				return err
			}
			for _, p := range all {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", p.Account, p.ID, p.Label, day(p.Created), day(p.LastUsed))
			}
			return w.Flush()
		},
	}
	revoke := &cobra.Command{
		Use:   "revoke ACCOUNT ID|LABEL",
		Short: "Revoke a password, at once",
		Args:  usage(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := e.load()
			if err != nil {
				return err
			}
			return app.RevokePassword(cmd.Context(), f, args[0], args[1])
		},
	}
	passwd.AddCommand(add, list, revoke)
	return passwd
}

func newSecret(e *env) *cobra.Command {
	sec := &cobra.Command{
		Use:   "secret",
		Short: "Secrets for vault:NAME in the configuration, sealed at rest",
		Args:  usage(cobra.NoArgs),
		RunE:  group,
	}
	set := &cobra.Command{
		Use:   "set NAME",
		Short: "Store a secret, read from the terminal or standard input",
		Args:  usage(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := e.load()
			if err != nil {
				return err
			}
			v, err := readSecret(cmd, "secret: ")
			if err != nil {
				return err
			}
			return app.SetSecret(cmd.Context(), f, args[0], v)
		},
	}
	list := &cobra.Command{
		Use:   "list",
		Short: "List the names of stored secrets",
		Args:  usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			f, err := e.load()
			if err != nil {
				return err
			}
			names, err := app.ListSecrets(cmd.Context(), f)
			if err != nil {
				return err
			}
			for _, n := range names {
				fmt.Fprintln(cmd.OutOrStdout(), n)
			}
			return nil
		},
	}
	del := &cobra.Command{
		Use:   "delete NAME",
		Short: "Delete a stored secret",
		Args:  usage(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := e.load()
			if err != nil {
				return err
			}
			return app.DeleteSecret(cmd.Context(), f, args[0])
		},
	}
	sec.AddCommand(set, list, del)
	return sec
}

// group is a command that only holds others.
func group(cmd *cobra.Command, _ []string) error {
	return usageError{fmt.Errorf("name one of its commands\n\n%s", cmd.UsageString())}
}

// readSecret reads one line: without echo from a terminal, else as it comes.
func readSecret(cmd *cobra.Command, prompt string) (secret.Text, error) {
	if f, ok := cmd.InOrStdin().(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		fmt.Fprint(cmd.ErrOrStderr(), prompt)
		b, err := term.ReadPassword(int(f.Fd()))
		fmt.Fprintln(cmd.ErrOrStderr())
		return secret.New(string(b)), err
	}
	line, err := bufio.NewReader(io.LimitReader(cmd.InOrStdin(), 64<<10)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return secret.Text{}, err
	}
	if line = strings.TrimRight(line, "\r\n"); line == "" {
		return secret.Text{}, errors.New("nothing came on standard input")
	}
	return secret.New(line), nil
}

// day shows a date for people; the zero time is "never".
func day(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return t.Local().Format(time.DateTime)
}
