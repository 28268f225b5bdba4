from hpt_hf.transfer import main

if __name__ == "__main__":
    main()
